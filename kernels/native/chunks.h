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

// Calls body(image, first pixel, behind the last one) for these pixels: image by image where something is by image,
// else at once, as if they were all of image 0.
template <class Body>
INLINE void for_images(bool by_image, int64_t pixels, int64_t first, int64_t last, const Body& body) {
  if (!by_image) return body(int64_t(0), first, last);
  for (int64_t image = first / pixels; first < last; ++image) {
    int64_t end = (image + 1) * pixels < last ? (image + 1) * pixels : last;
    body(image, first, end);
    first = end;
  }
}

}  // namespace
