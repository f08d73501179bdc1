// The memory of one half of a separable convolution: images in lanes, padded with zeros; weights in lanes; and
// convolutions as lists of offsets into such images.
#pragma once
#include <vector>

#include "lanes.h"
#include "loops.h"
#include "tables.h"

namespace {

// Pixels that are computed by the depthwise convolution before the pointwise one reads them: 16 KB a block, which
// the first cache holds.
constexpr int64_t GROUP = 256;

// An image [blocks][pad + h + pad][pad + w + pad][LANES]; sizes in floats.
struct Padded {
  int64_t h, w, pad;
  int blocks;
  ptrdiff_t row, block, image;
  Padded(int64_t c, int64_t h, int64_t w, int64_t pad)
      : h(h), w(w), pad(pad), blocks(blocks_of(c)), row((w + 2 * pad) * LANES), block((h + 2 * pad) * row),
        image(blocks * block) {}
  ptrdiff_t at(int64_t y, int64_t x) const { return (y + pad) * row + (x + pad) * LANES; }
  void clear_border(float* a) const {
    for (int b = 0; b < blocks; ++b, a += block) {
      std::memset(a, 0, pad * row * sizeof(float));
      std::memset(a + (h + pad) * row, 0, pad * row * sizeof(float));
      for (int64_t y = pad; y < h + pad; ++y) {
        std::memset(a + y * row, 0, pad * LANES * sizeof(float));
        std::memset(a + y * row + (w + pad) * LANES, 0, pad * LANES * sizeof(float));
      }
    }
  }
};

struct Term {
  const float* d;  // [c, taps]; null: the weight is one
  int64_t tap, taps;
  ptrdiff_t offset;
};

Stencil stencil_of(const std::vector<Term>& terms, int64_t c, Arena& memory) {
  Stencil found;
  found.block = ptrdiff_t(terms.size()) * LANES;
  found.weights = memory.zeros(blocks_of(c) * found.block + 1);
  for (size_t t = 0; t < terms.size(); ++t) {
    const Term& term = terms[t];
    found.offsets.push_back(term.offset);
    for (int b = 0; b < blocks_of(c); ++b) {
      float* into = found.weights + b * found.block + ptrdiff_t(t) * LANES;
      const float* from = term.d ? term.d + b * LANES * term.taps + term.tap : nullptr;
      for (int l = 0; l < lanes_of(c, b); ++l) into[l] = from ? from[l * term.taps] : 1.f;
    }
  }
  found.find_runs();
  return found;
}

// Writes pointwise weights as [block of outputs][inputs, in whole blocks][LANES]. The matrix is P [k, c] or its
// transpose. Several may stand side by side: `block` is the distance of blocks in `into`.
void pack(const float* p, int64_t k, int64_t c, bool transpose, float* into, ptrdiff_t block) {
  int64_t out = transpose ? c : k, in = transpose ? k : c, out_step = transpose ? 1 : c, in_step = transpose ? c : 1;
  for (int b = 0; b < blocks_of(out); ++b)
    for (int64_t i = 0; i < in; ++i) {
      const float* from = p + b * LANES * out_step + i * in_step;
      float* lanes = into + b * block + i * LANES;
      for (int l = 0; l < lanes_of(out, b); ++l) lanes[l] = from[l * out_step];
    }
}

float* packed(const float* p, int64_t k, int64_t c, bool transpose, Arena& memory) {
  int64_t out = transpose ? c : k, in = blocks_of(transpose ? k : c) * LANES;
  float* found = memory.zeros(blocks_of(out) * in * LANES);
  pack(p, k, c, transpose, found, in * LANES);
  return found;
}

// The geometry of a task
struct Half {
  const Task& task;
  int64_t n, c, k, ho, wo, group;  // group: rows of about GROUP pixels
  int kb, cb;
  Padded in, z;              // the padded source; the adjoint of the depthwise output, padded

  static int64_t reach(const Task& t) { return t.dilation * (t.kernel / 2); }

  Half(const Task& task, const Source& s, const Padded& in)
      : task(task), n(s.n), c(s.c), k(task.k),
        ho(task.kernel ? (s.h - 1) / task.stride + 1 : s.h / task.stride),
        wo(task.kernel ? (s.w - 1) / task.stride + 1 : s.w / task.stride),
        group(wo >= GROUP ? 1 : GROUP / wo), kb(blocks_of(task.k)), cb(blocks_of(s.c)), in(in),
        z(s.c, ho, wo, task.kernel ? reach(task) / task.stride + 1 : 0) {}

  int64_t side() const { return task.kernel ? task.kernel : 1; }
  int64_t shift(int64_t tap) const { return task.kernel ? tap * task.dilation - reach(task) : task.offset; }

  void forward_terms(std::vector<Term>& terms, const float* d, ptrdiff_t base) const {
    for (int64_t t = 0; t < side() * side(); ++t)
      terms.push_back({d, t, side() * side(), base + shift(t / side()) * in.row + shift(t % side()) * LANES});
  }

  // Source pixel (qy, qx) + stride * (j, i) receives d[tap] * z[(q - shift) / stride + (j, i)] from every tap
  // for which the quotient is whole. So each of the stride^2 classes of pixels has a stencil.
  void adjoint_terms(std::vector<Term>& terms, const float* d, int64_t qy, int64_t qx, ptrdiff_t base) const {
    for (int64_t back = side() * side(); back > 0; --back) {  // in the order of addresses, for `runs_tile`
      int64_t t = back - 1, dy = qy - shift(t / side()), dx = qx - shift(t % side());
      if (dy % task.stride || dx % task.stride) continue;
      terms.push_back({d, t, side() * side(), base + dy / task.stride * z.row + dx / task.stride * LANES});
    }
  }
};

// One depthwise convolution of a sum, and where its z stands. Without `there` it is left out; where d is null it is
// the identity.
struct Operand {
  bool there;
  const float* d;
  ptrdiff_t base;
};

// The stencils of all classes of pixels of one task; several operands are summed.
std::vector<Stencil> adjoint_stencils(const Half& half, const std::vector<Operand>& operands, Arena& memory) {
  std::vector<Stencil> found;
  for (int64_t qy = 0; qy < half.task.stride; ++qy)
    for (int64_t qx = 0; qx < half.task.stride; ++qx) {
      std::vector<Term> terms;
      for (const Operand& o : operands)
        if (o.there) half.adjoint_terms(terms, o.d, qy, qx, o.base);
      found.push_back(stencil_of(terms, half.c, memory));
    }
  return found;
}

Stencil forward_stencil(const Half& half, const std::vector<Operand>& operands, Arena& memory) {
  std::vector<Term> terms;
  for (const Operand& o : operands)
    if (o.there) half.forward_terms(terms, o.d, o.base);
  return stencil_of(terms, half.c, memory);
}

// out [blocks][h][w][LANES] (+)= the depthwise adjoint of z
void adjoint(const Half& half, const std::vector<Stencil>& stencils, const float* z, float* out, bool add) {
  int64_t h = half.in.h, w = half.in.w, s = half.task.stride;
  for (int b = 0; b < half.cb; ++b)
    for (int64_t y = 0; y < h; ++y)
      for (int64_t qx = 0; qx < s && qx < w; ++qx) {
        const Stencil& st = stencils[y % s * s + qx];
        stencil(1, z + b * half.z.block + half.z.at(y / s, 0), st, st.weights + b * st.block,
                out + ((b * h + y) * w + qx) * LANES, s * LANES, (w - qx + s - 1) / s, add);
      }
}

// `rows` rows of the depthwise output from row y on, [block][rows * wo][LANES]
void depthwise(const Half& half, const Stencil& st, const float* a, int64_t y, int64_t rows, float* out,
               ptrdiff_t out_block) {
  for (int b = 0; b < half.cb; ++b)
    for (int64_t r = 0; r < rows; ++r)
      stencil(half.task.stride, a + b * half.in.block + half.in.at((y + r) * half.task.stride, 0), st,
              st.weights + b * st.block, out + b * out_block + r * half.wo * LANES, LANES, half.wo, false);
}

// Copies pixels [n, c], `row` apart, into blocks of lanes. Pixels of one block are in lanes already, and stay.
const float* in_lanes(const float* pixels, int64_t n, int64_t c, int64_t row, float* scratch, ptrdiff_t block) {
  if (c == LANES && row == LANES) return pixels;
  for_channels(c, [&](auto lanes, int64_t i) {
    float* into = scratch + i / LANES * block;
    for (int64_t j = 0; j < n; ++j) store(into + j * LANES, load(lanes, pixels + j * row + i));
  });
  return scratch;
}

}  // namespace
