// Teams of threads of the C++ kernels under the thread sanitizer, which does not know OpenMP: here the threads are
// std::threads. kernels/native/sanitize.sh compiles and runs it.
#include <cstdio>
#include <thread>
#include <vector>

#include "../kernels/native/team.h"

namespace {

// Loops whose parts write and read what other threads wrote in the loop before, with nothing but the team between.
bool sums_are_right(int threads, int loops, int pause) {
  Team team(threads);
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back([&] { team.help(); });
  std::vector<long> values(97, 1);
  bool right = true;
  std::atomic<int> helped{0};  // parts that other threads computed after they had slept
  const std::thread::id caller = std::this_thread::get_id();
  for (int loop = 0; loop < loops; ++loop) {
    int64_t count = loop % int64_t(values.size()) + 1;
    std::vector<long> before = values, after(values);
    std::vector<int> computed(size_t(count), 0);
    team.each(count, [&](int64_t i) {
      ++computed[i];
      if (loop % 7 == 1 && std::this_thread::get_id() != caller) ++helped;
      after[i] = before[i] + before[(i + 1) % before.size()];
      if (pause && i % 5 == 0) std::this_thread::sleep_for(std::chrono::microseconds(pause));
    });
    for (int64_t i = 0; i < count; ++i)
      right = right && computed[i] == 1 && after[i] == before[i] + before[(i + 1) % before.size()];
    for (long& value : after) value %= 1000;
    values = after;
    // Long enough for the others to fall asleep, now and then
    if (pause && loop % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(4 * pause));
  }
  team.end();
  for (std::thread& helper : helpers) helper.join();
  return right && (threads == 1 || pause == 0 || helped > 0);
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 7})
    for (auto [loops, pause] : {std::pair(2000, 0), std::pair(200, 50)})
      if (!sums_are_right(threads, loops, pause)) {
        std::fprintf(stderr, "%d threads: a part was left out, computed twice, seen too early, or always computed by one thread\n", threads);
        return 1;
      }
  for (int sweep = 0; sweep < 500; ++sweep)  // begins and ends
    if (!sums_are_right(3, sweep % 3, 0)) return 1;
  std::puts("teams of threads: right, and no data race");
}
