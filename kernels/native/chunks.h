// Work on pixels [m, c] of several tensors at once, in chunks that stay in the first cache.
#pragma once
#include "lanes.h"

namespace {

constexpr int64_t CHUNK = 4096;  // floats: 16 KB of what is written, 16 KB of what is read with it, in the first cache

struct Chunks {
  int64_t pixels, count;
  template <class Call>
  explicit Chunks(const Call& q)
      : pixels(CHUNK / q.c > 0 ? CHUNK / q.c : 1), count((q.m + pixels - 1) / pixels) {}
  int64_t last(int64_t chunk, int64_t m) const { return (chunk + 1) * pixels < m ? (chunk + 1) * pixels : m; }
};

}  // namespace
