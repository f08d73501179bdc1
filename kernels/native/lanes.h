// Vectors of channels, and the memory that kernels work in.
//
// Every source is compiled once per processor level; a register of that level holds LANES channels. The code uses
// GCC's and clang's vector extension, so that one text serves all levels, and intrinsics only to load the first
// lanes of a register. The compiler never reorders sums (no -ffast-math): the same library gives the same bits.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE = 16;  // sums that stay in registers, of pixels or blocks of them: with the weights 17 or 18 of 32
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int TILE = 8;  // 9 or 10 of 16 registers; 8 sums hide the latency of two multiply-adds a cycle
#else
constexpr int LANES = 4;
constexpr int TILE = 8;
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace {

typedef float V __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t VI __attribute__((vector_size(LANES * sizeof(float))));

INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

// Asks for the cache line 4 KB ahead. This is for tensors that are read from end to end: the processor's own
// prefetching stops at every page, and the mixes of a step of 8 layers took 204 ms in place of 174 (Zen 5, one
// thread).
INLINE void fetch_ahead(const float* p) { __builtin_prefetch(p + 1024); }

// Copies fewer than MOST bytes. (A loop, or a call of memcpy, takes longer than these few branches.)
template <int MOST>
INLINE void copy_some(void* to, const void* from, int bytes) {
  char* into = static_cast<char*>(to);
  const char* at = static_cast<const char*>(from);
#define DARTS_PIECE(SIZE) \
  if (SIZE < MOST && bytes & SIZE) std::memcpy(into, at, SIZE), into += SIZE, at += SIZE;
  DARTS_PIECE(32) DARTS_PIECE(16) DARTS_PIECE(8) DARTS_PIECE(4) DARTS_PIECE(2) DARTS_PIECE(1)
#undef DARTS_PIECE
}

// The lanes of a register that hold channels: all of them, or the first ones, where a tensor has no more channels.
// (Computing the last channels one by one took two to four times as long: 4 and 8 channels, both levels.)
struct All {
  static constexpr int count = LANES;
};
struct Some {
  int count;
};

INLINE V load(All, const float* p) { return load(p); }

// The lanes behind the first ones are zero.
INLINE V load(Some lanes, const float* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(__mmask16((1u << lanes.count) - 1), p);
#elif defined(__AVX__)
  VI lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return _mm256_maskload_ps(p, (__m256i)(lane < lanes.count));
#else
  V v = {};
  copy_some<sizeof(V)>(&v, p, lanes.count * int(sizeof(float)));
  return v;
#endif
}

template <class Lanes>
INLINE V load_ahead(Lanes lanes, const float* p) {
  fetch_ahead(p);
  return load(lanes, p);
}

INLINE void store(All, float* p, V v) { store(p, v); }

// This is no masked store: the next pixel's load would wait for it, since the two overlap in the lanes that the
// mask leaves out.
INLINE void store(Some lanes, float* p, V v) {
  copy_some<sizeof(V)>(p, &v, lanes.count * int(sizeof(float)));
}

// Calls body(lanes, first channel) for every register of channels.
template <class Body>
INLINE void for_channels(int64_t c, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= c; i += LANES) body(All{}, i);
  if (i < c) body(Some{int(c - i)}, i);
}

// Stores past the caches, to an aligned address, what is read again only after much else. (An ordinary store reads
// the cache line first.)
INLINE void stream(float* p, V v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<V*>(p));
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512(p, v);
#elif defined(__AVX__)
  __builtin_ia32_movntps256(p, v);
#else
  store(p, v);
#endif
}

INLINE bool aligned(const float* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0; }

// Completes the stores of `stream`; it has to come before another thread reads them.
INLINE void end_of_streams() {
#if defined(__AVX__)
  __builtin_ia32_sfence();
#endif
}

// relu(x); NaN stays NaN.
INLINE V relu(V x) { return x < 0.f ? V{} : x; }

// [a > 0] g; where a is NaN, g.
INLINE V masked(V g, V a) { return a <= 0.f ? V{} : g; }

INLINE int blocks_of(int64_t channels) { return int((channels + LANES - 1) / LANES); }

INLINE int lanes_of(int64_t channels, int block) {
  int64_t left = channels - int64_t(block) * LANES;
  return left < LANES ? int(left) : LANES;
}

// Memory that is kept between calls, because a fresh allocation costs a page fault per 4 KB. A pointer that `take`
// returned is valid until the next `reset` of the same arena. Several threads may take from one at once.
class Arena {
 public:
  void reset() {
    if (pieces_.size() > 1) {  // it has grown: from now on it is one piece
      size_t total = 0;
      for (Piece& piece : pieces_) {
        total += piece.size;
        std::free(piece.start);
      }
      pieces_.clear();
      grow(total);
    }
    used_ = 0;
  }

  template <class T = float>
  T* take(size_t count) {
    size_t size = (count * sizeof(T) + 63) / 64 * 64;
    std::lock_guard<std::mutex> lock(mutex_);
    if (pieces_.empty() || used_ + size > pieces_.back().size) {
      grow(size < (size_t(1) << 20) ? size_t(1) << 20 : size);
      used_ = 0;
    }
    T* found = reinterpret_cast<T*>(pieces_.back().start + used_);
    used_ += size;
    return found;
  }

  template <class T = float>
  T* zeros(size_t count) {
    T* found = take<T>(count);
    std::memset(found, 0, count * sizeof(T));
    return found;
  }

  ~Arena() {
    for (Piece& piece : pieces_) std::free(piece.start);
  }

 private:
  struct Piece {
    char* start;
    size_t size;
  };

  void grow(size_t size) {
    void* start = std::aligned_alloc(64, size);
    if (start == nullptr) {
      std::fprintf(stderr, "darts_fast: out of memory (%zu bytes of workspace)\n", size);
      std::abort();
    }
    pieces_.push_back({static_cast<char*>(start), size});
  }

  std::mutex mutex_;
  std::vector<Piece> pieces_;
  size_t used_ = 0;
};

thread_local Arena of_call;    // of the thread that runs the sweep: all threads of a call take from it and read it
thread_local Arena of_worker;  // of each thread, for it alone

// Work is cut into parts by its size alone, never by the number of threads. Each part has sums of its own, and they
// are added in the order of the parts. So any number of threads gives the same bits.
constexpr int64_t PARTS = 32;

struct Parts {
  int64_t size, count;
  explicit Parts(int64_t whole) : size((whole + PARTS - 1) / PARTS), count((whole + size - 1) / size) {}
};

// Adds up partial[part][width] over the parts, in double and in their order.
template <class Number>
INLINE double* over_parts(const Number* partial, int64_t parts, int64_t width, Arena& arena) {
  double* found = arena.zeros<double>(width);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < width; ++i) found[i] += double(partial[part * width + i]);
  return found;
}

constexpr double EPSILON = 1e-5;  // of every batch norm, nn.BatchNorm2d's default

// The count, mean and sum of squared deviations of one channel. Each part sums differences from a shift of its own,
// which is a value of the channel: so float32 sums lose nothing to a large mean.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void merge(double n, double shift, double sum, double sum_of_squares) {
    double part_mean = shift + sum / n, part_squares = sum_of_squares - sum * (sum / n);
    double delta = part_mean - mean, total = count + n;
    mean += delta * (n / total);
    squares += part_squares + delta * delta * (count * n / total);
    count = total;
  }
  float r() const { return float(1.0 / std::sqrt(double(variance()) + EPSILON)); }
  float variance() const { return squares < 0 ? 0.f : float(squares / count); }
};

// Adds the sum of each channel to its sum in double.
template <class Lanes>
INLINE void flush(Lanes lanes, double* into, V sum) {
  for (int l = 0; l < lanes.count; ++l) into[l] += double(sum[l]);
}

// The sums of the channels in float32
template <class Lanes>
INLINE V narrow(Lanes lanes, const double* from) {
  V v = {};
  for (int l = 0; l < lanes.count; ++l) v[l] = float(from[l]);
  return v;
}

}  // namespace
