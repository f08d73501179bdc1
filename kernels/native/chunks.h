// Work on pixels [m, c] of several tensors at once, in chunks that stay in the first cache.
#pragma once
#include "lanes.h"

namespace {

// Floats of a chunk: 16 KB that are written and 16 KB that are read with them are in the first cache.
constexpr int64_t CHUNK = 4096;

struct Chunks {
  int64_t pixels, count;
  template <class Call>
  explicit Chunks(const Call& q)
      : pixels(CHUNK / q.c > 0 ? CHUNK / q.c : 1), count((q.m + pixels - 1) / pixels) {}
  int64_t last(int64_t chunk, int64_t m) const { return (chunk + 1) * pixels < m ? (chunk + 1) * pixels : m; }
};

}  // namespace
