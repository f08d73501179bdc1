// The processor's level, the digest of the sources, and the rate of multiply-adds.
#include "lanes.h"

// The digest of the sources that setup.py computes; empty where they are not to be compared.
#ifndef DARTS_SOURCES
#define DARTS_SOURCES
#endif
#define AS_TEXT(x) #x
#define TEXT(x) AS_TEXT(x)
extern "C" const char* darts_sources() { return TEXT(DARTS_SOURCES); }

// Which of the libraries this processor can run: 4 (x86-64-v4, AVX-512), 3 (x86-64-v3, AVX2) or 0 (portable).
extern "C" int darts_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
            __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl");
  return v4 ? 4 : v3 ? 3 : 0;
#else
  return 0;
#endif
}

// Computes multiply-adds as fast as one thread can, each with a load, as in the kernels, and returns how many.
// Benchmarks compare the kernels with this rate.
extern "C" int64_t darts_multiply_adds(int64_t rounds) {
  constexpr int PLACES = 8;  // rounds begin at different places, else the compiler would leave out the loop
  alignas(sizeof(V)) static float numbers[(TILE + PLACES) * LANES];
  V sums[TILE] = {};
  for (int64_t round = 0; round < rounds; ++round) {
    const float* p = numbers + round % PLACES * LANES;
    V weight = load(p);
    UNROLL for (int i = 0; i < TILE; ++i) sums[i] += weight * load(p + i * LANES);
  }
  UNROLL for (int i = 0; i < TILE; ++i) store(numbers + i * LANES, sums[i]);
  return rounds * TILE * LANES;
}
