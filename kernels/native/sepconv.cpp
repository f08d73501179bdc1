// Halves of separable convolutions: [batch norm] -> ReLU -> depthwise -> pointwise, and their four sweeps.
//
// One part of the work is some images of one source. Its relu(h) is written once, padded with zeros, as
// [block of LANES channels][row][column][lane], and stays in the second-level cache (83 KB at 32x32, 16
// channels) while every task that reads the source walks over it. Below that everything is one of four
// loops over registers: `stencil` (a depthwise convolution: a list of offsets and weights, so any kernel
// size, dilation, stride, their adjoints, and sums of two convolutions are the same loop), `pointwise`,
// `outer` (gradient of the pointwise weights) and `correlate` (gradient of the depthwise weights).
#include "lanes.h"

extern "C" {

// A source [n, h, w, c], channels-last; pointers may be null where kernels/native/__init__.py says so.
struct Source {
  const float *x, *x_tangent, *mean, *r;
  float* adjoint;  // of x in `backward`, the second one in `second`
  // With `factors` [3, c] or in `second` [5, c] of h instead, from which these make that of x (see Factors),
  // and `tangent` and `second` are given what `backward` wrote, `first`.
  float* factors;
  const float* first;
  float* bends;    // [BENDS, c], from `tangent` for `second`; without `first` the first two; null: x has no
                   // tangent, or no batch norm that moves with it
  int64_t batch;   // whether mean and r are those of x, and not constants
  int64_t n, h, w, c;
};

struct Task {
  int64_t source, kernel, stride, dilation, offset, k;  // kernel 0: no depthwise part; k: channels of y
  int64_t row;  // channels of the tensor that y is a part of: from a pixel, or a row of numbers, to the next
  const float *d, *p, *d_tangent, *p_tangent;           // [c, 1, kernel, kernel] and [k, c]
  const float *y_adjoint, *y_second;                    // [n, ho, wo, k]; the second may be zero: null
  // Of an output y that is read by a link: y_adjoint and y_second are those of its batch norm or of a node
  // that sums it, and y's own are made of them by the factors, [3, k] and [5, k], of y (`own`), its mean [k]
  // and its tangent (null: zero).
  const float *own, *own_mean, *own_tangent, *factors, *second_factors;
  float *y, *statistics;                                // y, or its tangent; [3, k]
  float *d_gradient, *p_gradient;
};
}

namespace {

constexpr int64_t GROUP = 256;  // pixels between depthwise and pointwise: 16 KB a block, in the first cache

// Floats of all sources and outputs of a call, from which on what it writes goes past the caches: 4 MB, of
// which the second cache would keep little.
constexpr int64_t STREAMED = 1 << 20;

// Registers: the four loops

template <int T, int STEP>
INLINE void stencil_tile(const float* in, const ptrdiff_t* offsets, const float* weights, int taps,
                         float* out, ptrdiff_t out_step, bool add) {
  V acc[T];
  UNROLL for (int j = 0; j < T; ++j) acc[j] = add ? load<V>(out + j * out_step) : V{};
  for (int t = 0; t < taps; ++t) {
    const float* p = in + offsets[t];
    V w = load<V>(weights + t * LANES);
    UNROLL for (int j = 0; j < T; ++j) acc[j] += w * load<V>(p + j * STEP * LANES);
  }
  UNROLL for (int j = 0; j < T; ++j) store(out + j * out_step, acc[j]);
}

// out[j] (+)= sum over taps of weights[t] * in[offsets[t] + j * STEP], in pixels of LANES channels.
template <int STEP>
void stencil(const float* in, const ptrdiff_t* offsets, const float* weights, int taps, float* out,
             ptrdiff_t out_step, int64_t n, bool add) {
  int64_t j = 0;
  for (; j + TILE <= n; j += TILE)
    stencil_tile<TILE, STEP>(in + j * STEP * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
  for (; j + 8 <= n; j += 8)
    stencil_tile<8, STEP>(in + j * STEP * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
  for (; j + 2 <= n; j += 2)
    stencil_tile<2, STEP>(in + j * STEP * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
  for (; j < n; ++j)
    stencil_tile<1, STEP>(in + j * STEP * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
}

// The same where taps stand in runs of RUN, SPACING pixels apart: each pixel is loaded once a run and not once
// a tap, which is 1.4 times as fast (3x3 and 5x5, 16 lanes).
template <int T, int RUN, int SPACING>
INLINE void runs_tile(const float* in, const ptrdiff_t* offsets, const float* weights, int taps, float* out,
                      ptrdiff_t out_step, bool add) {
  V acc[T];
  UNROLL for (int j = 0; j < T; ++j) acc[j] = add ? load<V>(out + j * out_step) : V{};
  for (int t = 0; t < taps; t += RUN, weights += RUN * LANES) {
    const float* p = in + offsets[t];
    V w[RUN];
    UNROLL for (int k = 0; k < RUN; ++k) w[k] = load<V>(weights + k * LANES);
    UNROLL for (int i = 0; i < T + (RUN - 1) * SPACING; ++i) {
      V x = load<V>(p + i * LANES);
      UNROLL for (int k = 0; k < RUN; ++k) {
        int j = i - k * SPACING;
        if (j >= 0 && j < T) acc[j] += w[k] * x;
      }
    }
  }
  UNROLL for (int j = 0; j < T; ++j) store(out + j * out_step, acc[j]);
}

template <int RUN, int SPACING>
void runs(const float* in, const ptrdiff_t* offsets, const float* weights, int taps, float* out,
          ptrdiff_t out_step, int64_t n, bool add) {
  int64_t j = 0;
  for (; j + TILE <= n; j += TILE)
    runs_tile<TILE, RUN, SPACING>(in + j * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
  for (; j + 8 <= n; j += 8)
    runs_tile<8, RUN, SPACING>(in + j * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
  for (; j + 4 <= n; j += 4)
    runs_tile<4, RUN, SPACING>(in + j * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
  for (; j < n; ++j)
    runs_tile<1, RUN, SPACING>(in + j * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
}

// A depthwise convolution as a list: where each tap reads, and [block][tap][LANES] weights.
struct Stencil {
  std::vector<ptrdiff_t> offsets;
  float* weights = nullptr;
  ptrdiff_t block = 0;
  int run = 1, spacing = 0;  // taps stand in runs of so many, so many pixels apart

  void find_runs() {
    for (int length : {5, 3})
      for (int pixels : {1, 2})
        if (in_runs(size_t(length), pixels * LANES)) {
          run = length, spacing = pixels;
          return;
        }
  }

  bool in_runs(size_t length, ptrdiff_t step) const {
    if (offsets.size() % length != 0) return false;
    for (size_t t = 0; t < offsets.size(); ++t)
      if (t % length != 0 && offsets[t] - offsets[t - 1] != step) return false;
    return true;
  }
};

INLINE void stencil(int64_t step, const float* in, const Stencil& st, const float* weights, float* out,
                    ptrdiff_t out_step, int64_t n, bool add) {
  int taps = int(st.offsets.size());
  const ptrdiff_t* offsets = st.offsets.data();
#define DARTS_CASE(RUN, SPACING)                              \
  if (step == 1 && st.run == RUN && st.spacing == SPACING)    \
    return runs<RUN, SPACING>(in, offsets, weights, taps, out, out_step, n, add);
  DARTS_CASE(3, 1) DARTS_CASE(3, 2) DARTS_CASE(5, 1) DARTS_CASE(5, 2)
#undef DARTS_CASE
  if (step == 1) return stencil<1>(in, offsets, weights, taps, out, out_step, n, add);
  if (step == 2) return stencil<2>(in, offsets, weights, taps, out, out_step, n, add);
  for (int64_t j = 0; j < n; ++j)  // no stride of the search space
    stencil_tile<1, 1>(in + j * step * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
}

// acc[j] = sum over channels c of weights[c] * z[j][c]: z in blocks, weights [blocks * LANES][LANES].
template <int T>
INLINE void pointwise_tile(const float* z, ptrdiff_t block, int blocks, const float* weights, V (&acc)[T]) {
  UNROLL for (int j = 0; j < T; ++j) acc[j] = V{};
  for (int b = 0; b < blocks; ++b, z += block)
    for (int l = 0; l < LANES; ++l, weights += LANES) {
      V w = load<V>(weights);
      UNROLL for (int j = 0; j < T; ++j) acc[j] += w * z[j * LANES + l];
    }
}

template <int T>
INLINE void pointwise_store(const float* z, ptrdiff_t block, int blocks, const float* weights, float* out,
                            bool add) {
  V acc[T];
  pointwise_tile<T>(z, block, blocks, weights, acc);
  if (add) UNROLL for (int j = 0; j < T; ++j) acc[j] += load<V>(out + j * LANES);
  UNROLL for (int j = 0; j < T; ++j) store(out + j * LANES, acc[j]);
}

// One block of output channels of n pixels, written in lanes or added to what is there.
void pointwise(const float* z, ptrdiff_t block, int blocks, const float* weights, float* out, int64_t n,
               bool add) {
  int64_t j = 0;
  for (; j + TILE <= n; j += TILE)
    pointwise_store<TILE>(z + j * LANES, block, blocks, weights, out + j * LANES, add);
  for (; j + 8 <= n; j += 8)
    pointwise_store<8>(z + j * LANES, block, blocks, weights, out + j * LANES, add);
  for (; j + 4 <= n; j += 4)
    pointwise_store<4>(z + j * LANES, block, blocks, weights, out + j * LANES, add);
  for (; j + 2 <= n; j += 2)
    pointwise_store<2>(z + j * LANES, block, blocks, weights, out + j * LANES, add);
  for (; j < n; ++j) pointwise_store<1>(z + j * LANES, block, blocks, weights, out + j * LANES, add);
}

struct Sums {  // of a block of channels, about a shift
  V shift, sum, squares;
};

template <int T>
INLINE void pointwise_sum(const float* z, ptrdiff_t block, int blocks, const float* weights, float* y,
                          int64_t k, int count, bool streamed, Sums& sums) {
  V acc[T];
  pointwise_tile<T>(z, block, blocks, weights, acc);
  if (streamed) {
    UNROLL for (int j = 0; j < T; ++j) stream(y + j * k, acc[j]);
  } else {
    UNROLL for (int j = 0; j < T; ++j) store_some(y + j * k, acc[j], count);
  }
  UNROLL for (int j = 0; j < T; ++j) {
    V d = acc[j] - sums.shift;
    sums.sum += d;
    sums.squares += d * d;
  }
}

// One block of output channels of n pixels, written into y, pixels k apart, and their sums.
void pointwise_out(const float* z, ptrdiff_t block, int blocks, const float* weights, float* y, int64_t k,
                   int count, int64_t n, bool streamed, Sums& sums) {
  streamed = streamed && count == LANES && k % LANES == 0 && aligned(y);
  int64_t j = 0;
  for (; j + TILE <= n; j += TILE)
    pointwise_sum<TILE>(z + j * LANES, block, blocks, weights, y + j * k, k, count, streamed, sums);
  for (; j + 8 <= n; j += 8)
    pointwise_sum<8>(z + j * LANES, block, blocks, weights, y + j * k, k, count, streamed, sums);
  for (; j < n; ++j)
    pointwise_sum<1>(z + j * LANES, block, blocks, weights, y + j * k, k, count, streamed, sums);
}

// found[c][.] += sum over n pixels of z[c] * y[.]
void outer(const float* y, const float* z, int64_t n, float* found) {
  V acc[LANES];
  UNROLL for (int l = 0; l < LANES; ++l) acc[l] = load<V>(found + l * LANES);
  for (int64_t j = 0; j < n; ++j, y += LANES, z += LANES) {
    V v = load<V>(y);
    UNROLL for (int l = 0; l < LANES; ++l) acc[l] += v * z[l];
  }
  UNROLL for (int l = 0; l < LANES; ++l) store(found + l * LANES, acc[l]);
}

// found[ky][kx] += sum over rows and n columns of z[row][x] * a[row][x * STEP + ky, kx], ROWS kernel rows.
template <int ROWS, int K, int DILATION, int STEP>
void correlate_rows(const float* z, ptrdiff_t z_row, const float* a, ptrdiff_t a_row, ptrdiff_t kernel_row,
                    int64_t rows, int64_t n, float* found) {
  V acc[ROWS * K];
  UNROLL for (int t = 0; t < ROWS * K; ++t) acc[t] = load<V>(found + t * LANES);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t x = 0; x < n; ++x) {
      V v = load<V>(z + row * z_row + x * LANES);
      const float* p = a + row * a_row + x * STEP * LANES;
      UNROLL for (int ky = 0; ky < ROWS; ++ky)
        UNROLL for (int kx = 0; kx < K; ++kx)
          acc[ky * K + kx] += v * load<V>(p + ky * kernel_row + kx * DILATION * LANES);
    }
  UNROLL for (int t = 0; t < ROWS * K; ++t) store(found + t * LANES, acc[t]);
}

template <int K, int DILATION, int STEP>
void correlate(const float* z, ptrdiff_t z_row, const float* a, ptrdiff_t a_row, ptrdiff_t kernel_row,
               int64_t rows, int64_t n, float* found) {
  constexpr int ROWS = LANES == 16 || K == 3 ? K : 2;  // 25 sums do not fit 16 registers
  int ky = 0;
  for (; ky + ROWS <= K; ky += ROWS)
    correlate_rows<ROWS, K, DILATION, STEP>(z, z_row, a + ky * kernel_row, a_row, kernel_row, rows, n,
                                            found + ky * K * LANES);
  for (; ky < K; ++ky)
    correlate_rows<1, K, DILATION, STEP>(z, z_row, a + ky * kernel_row, a_row, kernel_row, rows, n,
                                         found + ky * K * LANES);
}

void correlate(const Task& task, const float* z, ptrdiff_t z_row, const float* a, ptrdiff_t width,
               int64_t rows, int64_t n, float* found) {
  ptrdiff_t a_row = task.stride * width, kernel_row = task.dilation * width;
#define DARTS_CASE(K, D, S)                                            \
  if (task.kernel == K && task.dilation == D && task.stride == S)      \
    return correlate<K, D, S>(z, z_row, a, a_row, kernel_row, rows, n, found);
  DARTS_CASE(3, 1, 1) DARTS_CASE(3, 2, 1) DARTS_CASE(5, 1, 1) DARTS_CASE(5, 2, 1)
  DARTS_CASE(3, 1, 2) DARTS_CASE(3, 2, 2) DARTS_CASE(5, 1, 2) DARTS_CASE(5, 2, 2)
#undef DARTS_CASE
  for (int64_t t = 0; t < task.kernel * task.kernel; ++t) {  // no kernel of the search space
    V sum = load<V>(found + t * LANES);
    const float* p = a + t / task.kernel * kernel_row + t % task.kernel * task.dilation * LANES;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t x = 0; x < n; ++x)
        sum += load<V>(z + row * z_row + x * LANES) * load<V>(p + row * a_row + x * task.stride * LANES);
    store(found + t * LANES, sum);
  }
}

// Memory: images in lanes

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

Stencil stencil_of(const std::vector<Term>& terms, int64_t c) {
  Stencil found;
  found.block = ptrdiff_t(terms.size()) * LANES;
  found.weights = of_call.zeros(blocks_of(c) * found.block + 1);
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

// Pointwise weights [block of outputs][inputs, in whole blocks][LANES]; matrix [rows, columns] is P [k, c] or
// its transpose. `into` places one of several matrices that stand side by side.
void pack(const float* p, int64_t k, int64_t c, bool transpose, float* into, ptrdiff_t block) {
  int64_t out = transpose ? c : k, in = transpose ? k : c, out_step = transpose ? 1 : c, in_step = transpose ? c : 1;
  for (int b = 0; b < blocks_of(out); ++b)
    for (int64_t i = 0; i < in; ++i) {
      const float* from = p + b * LANES * out_step + i * in_step;
      float* lanes = into + b * block + i * LANES;
      for (int l = 0; l < lanes_of(out, b); ++l) lanes[l] = from[l * out_step];
    }
}

float* packed(const float* p, int64_t k, int64_t c, bool transpose) {
  int64_t out = transpose ? c : k, in = blocks_of(transpose ? k : c) * LANES;
  float* found = of_call.zeros(blocks_of(out) * in * LANES);
  if (p != nullptr) pack(p, k, c, transpose, found, in * LANES);
  return found;
}

// A task's geometry and weights, prepared once a call
struct Half {
  const Task& task;
  int64_t n, c, k, ho, wo, group;  // group: rows between depthwise and pointwise
  int kb, cb;
  Padded in, z;              // the padded source; the adjoint of the depthwise output, padded
  std::vector<Term> taps;    // of the forward convolution, relative to the source's pixel (y, x) * stride

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

  // Source pixel (qy, qx) + stride * (j, i) gets d[tap] * z[(q - shift) / stride + (j, i)] from every tap
  // for which that is whole: one stencil for each of the stride^2 classes of pixels.
  void adjoint_terms(std::vector<Term>& terms, const float* d, int64_t qy, int64_t qx, ptrdiff_t base) const {
    for (int64_t back = side() * side(); back > 0; --back) {  // backwards: by address, see `runs_tile`
      int64_t t = back - 1, dy = qy - shift(t / side()), dx = qx - shift(t % side());
      if (dy % task.stride || dx % task.stride) continue;
      terms.push_back({d, t, side() * side(), base + dy / task.stride * z.row + dx / task.stride * LANES});
    }
  }
};

// A depthwise convolution that is there, and where its z stands: a task without one has d null and is there.
struct Operand {
  bool there;
  const float* d;
  ptrdiff_t base;
};

// The stencils of all classes of pixels of one task; several operands are summed.
std::vector<Stencil> adjoint_stencils(const Half& half, const std::vector<Operand>& operands) {
  std::vector<Stencil> found;
  for (int64_t qy = 0; qy < half.task.stride; ++qy)
    for (int64_t qx = 0; qx < half.task.stride; ++qx) {
      std::vector<Term> terms;
      for (const Operand& o : operands)
        if (o.there) half.adjoint_terms(terms, o.d, qy, qx, o.base);
      found.push_back(stencil_of(terms, half.c));
    }
  return found;
}

Stencil forward_stencil(const Half& half, const std::vector<Operand>& operands) {
  std::vector<Term> terms;
  for (const Operand& o : operands)
    if (o.there) half.forward_terms(terms, o.d, o.base);
  return stencil_of(terms, half.c);
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

// Pixels [n, c], `row` apart, into blocks of lanes; where one block is all there is, they are in lanes already.
const float* in_lanes(const float* pixels, int64_t n, int64_t c, int64_t row, float* scratch, ptrdiff_t block) {
  if (c == LANES && row == LANES) return pixels;
  for (int b = 0; b < blocks_of(c); ++b) {
    int count = lanes_of(c, b);
    for (int64_t j = 0; j < n; ++j)
      store(scratch + b * block + j * LANES, load_some(pixels + j * row + b * LANES, count));
  }
  return scratch;
}

// Rows of c numbers, `pitch` apart, padded to whole blocks
float* padded(const float* from, int64_t rows, int64_t c, int64_t pitch) {
  int64_t width = blocks_of(c) * LANES;
  float* found = of_call.zeros(rows * width);
  for (int64_t row = 0; row < rows; ++row) std::memcpy(found + row * width, from + row * pitch, size_t(c) * sizeof(float));
  return found;
}

// The adjoint of a task's output, and the second one, in lanes
struct Adjoint {
  const Half& half;
  const float *mean = nullptr, *first = nullptr, *second = nullptr;  // of an output with a link

  explicit Adjoint(const Half& half) : half(half) {
    const Task& t = half.task;
    if (t.own == nullptr) return;
    mean = padded(t.own_mean, 1, half.k, half.k), first = padded(t.factors, FIRST_FACTORS, half.k, t.row);
    if (t.second_factors) second = padded(t.second_factors, FACTORS, half.k, t.row);
  }

  // Of n pixels from number `pixel` on; in the tensor itself where that is in lanes already.
  const float* lanes(int64_t pixel, int64_t n, bool of_second, float* scratch, ptrdiff_t block) const {
    const Task& t = half.task;
    int64_t row = t.row, at = pixel * row;
    const float* g = (of_second ? t.y_second : t.y_adjoint) + at;
    if (t.own == nullptr) return in_lanes(g, n, half.k, row, scratch, block);
    for (int b = 0; b < half.kb; ++b, at += LANES, g += LANES) {
      Factors<V> factors((of_second ? second : first) + b * LANES, half.kb * LANES, of_second,
                         load<V>(mean + b * LANES));
      const float* y = t.own + at;
      bool moving = of_second && t.own_tangent != nullptr;
      const float *yd = moving ? t.own_tangent + at : nullptr, *g_first = moving ? t.y_adjoint + at : nullptr;
      auto pixels = [&](int count, auto moves) {
        for (int64_t j = 0; j < n; ++j) {
          ptrdiff_t i = j * row;
          fetch_ahead(g + i), fetch_ahead(y + i);
          V found = factors.of(load_some(g + i, count), load_some(y + i, count));
          if (moves.value) {
            fetch_ahead(g_first + i), fetch_ahead(yd + i);
            found = factors.and_of(found, load_some(g_first + i, count), load_some(yd + i, count));
          }
          store(scratch + b * block + j * LANES, found);
        }
      };
      int count = lanes_of(half.k, b);
      auto all = [&](auto moves) { count == LANES ? pixels(LANES, moves) : pixels(count, moves); };
      moving ? all(std::true_type{}) : all(std::false_type{});
    }
    return scratch;
  }
};

// The batch norm of a source, per channel and padded to whole blocks
struct Norm {
  bool present = false, batch = false;
  float *mean = nullptr, *r = nullptr;  // h = (x - mean) r
  float *xd_mean = nullptr, *t = nullptr;  // hd = r (xd - mean(xd) - h mean(h xd))

  Norm() = default;
  explicit Norm(const Source& s) : present(s.mean != nullptr), batch(s.batch != 0) {
    if (!present) return;
    int64_t padded = blocks_of(s.c) * LANES;
    mean = of_call.zeros(padded), r = of_call.zeros(padded);
    xd_mean = of_call.zeros(padded), t = of_call.zeros(padded);
    for (int64_t i = 0; i < s.c; ++i) {
      mean[i] = s.mean[i];
      r[i] = s.r[i];
    }
  }
};

// One row of relu(h) of a block of channels, and of its tangent
template <bool NORM, bool TANGENT>
INLINE void rectify_row(const float* x, const float* xd, int64_t n, int64_t c, int count, V mean, V r, V xd_mean,
                        V t, float* out, float* tangent) {
  for (int64_t j = 0; j < n; ++j) {
    fetch_ahead(x + j * c);
    V h = load_some(x + j * c, count);
    if (NORM) h = (h - mean) * r;
    V rectified = relu(h);
    store(out + j * LANES, rectified);
    if (TANGENT) {
      fetch_ahead(xd + j * c);
      V hd = load_some(xd + j * c, count);
      if (NORM) hd = r * (hd - xd_mean - h * t);
      store(tangent + j * LANES, masked(hd, rectified));
    }
  }
}

// relu(h) of one image, padded; and, where xd is given, its tangent behind it.
void rectify(const Source& s, const Norm& norm, const Padded& in, int64_t image, bool tangent, float* a) {
  const float* x = s.x + image * s.h * s.w * s.c;
  const float* xd = tangent ? s.x_tangent + image * s.h * s.w * s.c : nullptr;
  in.clear_border(a);
  if (tangent) in.clear_border(a + in.image);
  for (int b = 0; b < in.blocks; ++b) {
    int count = lanes_of(s.c, b);
    V mean = {}, r = {}, xd_mean = {}, t = {};
    if (norm.present) {
      mean = load<V>(norm.mean + b * LANES), r = load<V>(norm.r + b * LANES);
      xd_mean = load<V>(norm.xd_mean + b * LANES), t = load<V>(norm.t + b * LANES);
    }
    for (int64_t y = 0; y < s.h; ++y) {
      float* out = a + b * in.block + in.at(y, 0);
      ptrdiff_t at = y * s.w * s.c + b * LANES;
      auto row = [&](auto normalized, auto with_tangent) {
        auto whole = [&](int lanes) {
          rectify_row<normalized.value, with_tangent.value>(x + at, with_tangent.value ? xd + at : nullptr, s.w, s.c,
                                                            lanes, mean, r, xd_mean, t, out, out + in.image);
        };
        count == LANES ? whole(LANES) : whole(count);
      };
      using Yes = std::true_type;
      using No = std::false_type;
      if (norm.present) tangent ? row(Yes{}, Yes{}) : row(Yes{}, No{});
      else tangent ? row(No{}, Yes{}) : row(No{}, No{});
    }
  }
}

// The tasks of a call, by source
struct Call {
  std::vector<Padded> inputs;
  std::vector<Half> halves;
  std::vector<Norm> norms;
  std::vector<std::vector<int>> tasks;  // of each source
  std::vector<Parts> parts;
  std::vector<std::pair<int, int64_t>> units;  // source and part: what is computed in parallel
  bool streamed;                               // whether what is written goes past the caches

  Call(const Source* sources, int64_t n_sources, const Task* list, int64_t n_tasks) : tasks(n_sources) {
    of_call.reset();
    for (int64_t t = 0; t < n_tasks; ++t) tasks[list[t].source].push_back(int(t));
    for (int64_t s = 0; s < n_sources; ++s) {
      int64_t pad = 0;
      for (int t : tasks[s])
        if (Half::reach(list[t]) > pad) pad = Half::reach(list[t]);
      inputs.emplace_back(sources[s].c, sources[s].h, sources[s].w, pad);
      norms.emplace_back(sources[s]);
      parts.emplace_back(sources[s].n);
      for (int64_t part = 0; part < parts[s].count; ++part) units.emplace_back(int(s), part);
    }
    int64_t floats = 0;
    for (int64_t s = 0; s < n_sources; ++s) floats += sources[s].n * sources[s].h * sources[s].w * sources[s].c;
    for (int64_t t = 0; t < n_tasks; ++t) {
      halves.emplace_back(list[t], sources[list[t].source], inputs[list[t].source]);
      floats += halves[t].n * halves[t].ho * halves[t].wo * halves[t].k;
    }
    streamed = floats >= STREAMED;
  }

  const Parts& parts_of(int task) const { return parts[halves[task].task.source]; }
};

// Runs body(source, part, first image, last image) for every unit.
template <class Body>
void for_units(const Call& call, const Source* sources, int threads, const Body& body) {
  int64_t count = int64_t(call.units.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t u = 0; u < count; ++u) {
    of_worker.reset();
    auto [s, part] = call.units[u];
    int64_t size = call.parts[s].size, first = part * size;
    body(s, part, first, first + size < sources[s].n ? first + size : sources[s].n);
    end_of_streams();
  }
}

// Sums of a part, a channel at a time: [source][part][quantity][channel], double
struct ChannelSums {
  std::vector<double*> of_source;
  std::vector<int64_t> width;
  int quantities;

  ChannelSums(const Call& call, int quantities) : quantities(quantities) {
    for (size_t s = 0; s < call.inputs.size(); ++s) {
      width.push_back(call.inputs[s].blocks * LANES);
      of_source.push_back(of_call.zeros<double>(call.parts[s].count * quantities * width[s]));
    }
  }
  double* at(int s, int64_t part, int quantity) const {
    return of_source[s] + (part * quantities + quantity) * width[s];
  }
  float mean(int s, const Parts& parts, int quantity, int64_t channel, double m) const {
    double sum = 0;
    for (int64_t part = 0; part < parts.count; ++part) sum += at(s, part, quantity)[channel];
    return float(sum / m);
  }
};

}  // namespace

// y of every task, and its statistics.
extern "C" void darts_sepconv_forward(const Source* sources, int64_t n_sources, const Task* tasks,
                                      int64_t n_tasks, int threads) {
  Call call(sources, n_sources, tasks, n_tasks);
  std::vector<Stencil> stencils;
  std::vector<const float*> p;
  std::vector<double*> sums;  // of each task, [part][shift, sum, squares][k]
  for (const Half& half : call.halves) {
    stencils.push_back(forward_stencil(half, {{true, half.task.d, 0}}));
    p.push_back(packed(half.task.p, half.k, half.c, false));
    sums.push_back(of_call.zeros<double>(call.parts[half.task.source].count * 3 * half.kb * LANES));
  }
  for_units(call, sources, threads, [&](int s, int64_t part, int64_t first, int64_t last) {
    const Padded& in = call.inputs[s];
    float* a = of_worker.take(in.image);
    float* z = of_worker.take(in.blocks * LANES * (GROUP > in.w ? GROUP : in.w));
    for (int64_t image = first; image < last; ++image) {
      rectify(sources[s], call.norms[s], in, image, false, a);
      for (int t : call.tasks[s]) {
        const Half& half = call.halves[t];
        int64_t width = half.kb * LANES;
        double* of_part = sums[t] + part * 3 * width;
        for (int64_t y = 0; y < half.ho; y += half.group) {
          int64_t rows = y + half.group < half.ho ? half.group : half.ho - y, pixels = rows * half.wo;
          ptrdiff_t block = pixels * LANES;
          depthwise(half, stencils[t], a, y, rows, z, block);
          float* out = half.task.y + (image * half.ho + y) * half.wo * half.task.row;
          for (int b = 0; b < half.kb; ++b) {
            const float* weights = p[t] + ptrdiff_t(b) * half.cb * LANES * LANES;
            double* at = of_part + b * LANES;
            if (image == first && y == 0) {  // the shift: the part's first pixel
              V pixel[1];
              pointwise_tile<1>(z, block, half.cb, weights, pixel);
              flush(at, pixel[0]);
            }
            Sums found = {narrow(at, V{}), {}, {}};
            pointwise_out(z, block, half.cb, weights, out + b * LANES, half.task.row, lanes_of(half.k, b), pixels,
                          call.streamed, found);
            flush(at + width, found.sum);
            flush(at + 2 * width, found.squares);
          }
        }
      }
    }
  });
  for (size_t t = 0; t < call.halves.size(); ++t) {
    const Half& half = call.halves[t];
    const Parts& parts = call.parts_of(int(t));
    int64_t width = half.kb * LANES;
    for (int64_t i = 0; i < half.k; ++i) {
      Moments moments;
      for (int64_t part = 0; part < parts.count; ++part) {
        int64_t images = part + 1 < parts.count ? parts.size : half.n - part * parts.size;
        const double* at = sums[t] + part * 3 * width + i;
        moments.merge(double(images * half.ho * half.wo), at[0], at[width], at[2 * width]);
      }
      half.task.statistics[i] = float(moments.mean);
      half.task.statistics[half.task.row + i] = moments.variance();
      half.task.statistics[2 * half.task.row + i] = moments.r();
    }
  }
}

namespace {

// Z (+)= P' Y of `rows` rows from row y on, in the padded z.
void adjoint_rows(const Half& half, const float* weights, const float* y_lanes, ptrdiff_t y_block, int64_t y,
                  int64_t rows, float* z, bool add = false) {
  for (int b = 0; b < half.cb; ++b)
    for (int64_t r = 0; r < rows; ++r)
      pointwise(y_lanes + r * half.wo * LANES, y_block, half.kb, weights + ptrdiff_t(b) * half.kb * LANES * LANES,
                z + b * half.z.block + half.z.at(y + r, 0), half.wo, add);
}

// B(g) with G = [h > 0] g written to memory: the sums that it needs, by row; `a` is relu(h), so that
// sum G h = sum G a.
struct MaskedSums {
  double *g, *gh, *ghd;  // null where not wanted
};

// out [h, w, c] = [a > 0] g, g [blocks][h][w][LANES], and its sums
void mask_image(const Source& s, const Padded& in, const float* g, const float* a, bool tangent, float* out,
                bool streamed, MaskedSums sums) {
  for (int b = 0; b < in.blocks; ++b) {
    int count = lanes_of(s.c, b);
    bool past = streamed && s.c % LANES == 0 && aligned(out);
    for (int64_t y = 0; y < s.h; ++y) {
      const float* ga = g + (b * s.h + y) * s.w * LANES;
      const float* aa = a + b * in.block + in.at(y, 0);
      V total = {}, with_h = {}, with_hd = {};
      for (int64_t j = 0; j < s.w; ++j) {
        V rectified = load<V>(aa + j * LANES), found = masked(load<V>(ga + j * LANES), rectified);
        total += found;
        with_h += found * rectified;
        if (tangent) with_hd += found * load<V>(aa + in.image + j * LANES);
        float* at = out + (y * s.w + j) * s.c + b * LANES;
        past ? stream(at, found) : store_some(at, found, count);
      }
      if (sums.g) flush(sums.g + b * LANES, total), flush(sums.gh + b * LANES, with_h);
      if (sums.ghd) flush(sums.ghd + b * LANES, with_hd);
    }
  }
}

}  // namespace

// The adjoint of every source, and the gradients of the weights where the tasks have room for them.
extern "C" void darts_sepconv_backward(const Source* sources, int64_t n_sources, const Task* tasks,
                                       int64_t n_tasks, int threads) {
  Call call(sources, n_sources, tasks, n_tasks);
  std::vector<Stencil> forward;
  std::vector<std::vector<Stencil>> backward;
  std::vector<const float*> p;
  std::vector<Adjoint> adjoints;
  std::vector<float*> p_sums, d_sums;  // of each task and part, [kb][cb][c lanes][k lanes] and [cb][tap][lanes]
  for (const Half& half : call.halves) {
    forward.push_back(forward_stencil(half, {{true, half.task.d, 0}}));
    backward.push_back(adjoint_stencils(half, {{true, half.task.d, 0}}));
    p.push_back(packed(half.task.p, half.k, half.c, true));
    adjoints.emplace_back(half);
    int64_t parts = half.task.p_gradient ? call.parts[half.task.source].count : 0;
    p_sums.push_back(of_call.zeros(parts * half.kb * half.cb * LANES * LANES));
    d_sums.push_back(of_call.zeros(parts * half.cb * half.side() * half.side() * LANES));
  }
  ChannelSums sums(call, 2);
  for_units(call, sources, threads, [&](int s, int64_t part, int64_t first, int64_t last) {
    const Source& source = sources[s];
    const Padded& in = call.inputs[s];
    int64_t pixels_most = GROUP > in.w ? GROUP : in.w;
    ptrdiff_t z_most = 0;
    int kb_most = 0;
    for (int t : call.tasks[s]) {
      if (call.halves[t].z.image > z_most) z_most = call.halves[t].z.image;
      if (call.halves[t].kb > kb_most) kb_most = call.halves[t].kb;
    }
    float* a = of_worker.take(in.image);
    float* g = of_worker.zeros(in.blocks * in.h * in.w * LANES);
    float* z_adjoint = of_worker.take(z_most);
    float* z = of_worker.take(in.blocks * LANES * pixels_most);
    float* scratch = of_worker.take(kb_most * LANES * pixels_most);
    for (int64_t image = first; image < last; ++image) {
      rectify(source, call.norms[s], in, image, false, a);
      bool add = false;
      for (int t : call.tasks[s]) {
        const Half& half = call.halves[t];
        int64_t taps = half.side() * half.side();
        half.z.clear_border(z_adjoint);
        for (int64_t y = 0; y < half.ho; y += half.group) {
          int64_t rows = y + half.group < half.ho ? half.group : half.ho - y, pixels = rows * half.wo;
          ptrdiff_t block = pixels * LANES;
          const float* lanes = adjoints[t].lanes((image * half.ho + y) * half.wo, pixels, false, scratch, block);
          adjoint_rows(half, p[t], lanes, block, y, rows, z_adjoint);
          if (half.task.p_gradient == nullptr) continue;
          depthwise(half, forward[t], a, y, rows, z, block);
          float* into = p_sums[t] + part * half.kb * half.cb * LANES * LANES;
          for (int k = 0; k < half.kb; ++k)
            for (int c = 0; c < half.cb; ++c, into += LANES * LANES)
              outer(lanes + k * block, z + c * block, pixels, into);
          if (half.task.d_gradient == nullptr) continue;
          for (int c = 0; c < half.cb; ++c)
            correlate(half.task, z_adjoint + c * half.z.block + half.z.at(y, 0), half.z.row,
                      a + c * in.block + in.at(y * half.task.stride, 0) + half.shift(0) * (in.row + LANES),
                      in.row, rows, half.wo, d_sums[t] + (part * half.cb + c) * taps * LANES);
        }
        adjoint(half, backward[t], z_adjoint, g, add);
        add = true;
      }
      MaskedSums wanted = {};
      if (call.norms[s].present) wanted = {sums.at(s, part, 0), sums.at(s, part, 1), nullptr};
      mask_image(source, in, g, a, false, source.adjoint + image * in.h * in.w * source.c, call.streamed,
                 wanted);
    }
  });
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t t = 0; t < n_tasks; ++t) {
    const Half& half = call.halves[t];
    if (half.task.p_gradient == nullptr) continue;
    of_worker.reset();
    int64_t parts = call.parts_of(int(t)).count, taps = half.side() * half.side();
    const double* p_total = over_parts(p_sums[t], parts, half.kb * half.cb * LANES * LANES, of_worker);
    for (int64_t o = 0; o < half.k; ++o) {
      const double* from = p_total + o / LANES * half.cb * LANES * LANES + o % LANES;  // a row of LANES a channel
      for (int64_t i = 0; i < half.c; ++i) half.task.p_gradient[o * half.c + i] = float(from[i * LANES]);
    }
    if (half.task.d_gradient == nullptr) continue;
    const double* d_total = over_parts(d_sums[t], parts, half.cb * taps * LANES, of_worker);
    for (int64_t i = 0; i < half.c; ++i)
      for (int64_t tap = 0; tap < taps; ++tap)
        half.task.d_gradient[i * taps + tap] = float(d_total[(i / LANES * taps + tap) * LANES + i % LANES]);
  }
  std::vector<float*> means(n_sources);  // of G and G h
  for (int64_t s = 0; s < n_sources; ++s) {
    if (!call.norms[s].present) continue;
    means[s] = of_call.zeros(2 * sources[s].c);
    if (!call.norms[s].batch) continue;
    for (int64_t i = 0; i < sources[s].c; ++i)
      for (int q = 0; q < 2; ++q)
        means[s][q * sources[s].c + i] =
            sums.mean(int(s), call.parts[s], q, i, double(sources[s].n * sources[s].h * sources[s].w));
    if (sources[s].factors == nullptr) continue;
    for (int64_t i = 0; i < sources[s].c; ++i)
      write_factors(sources[s].factors + i, sources[s].c, call.norms[s].r[i], call.norms[s].r[i], means[s][i],
                    means[s][sources[s].c + i], call.norms[s].batch);
    means[s] = nullptr;
  }
  for_units(call, sources, threads, [&](int s, int64_t, int64_t first, int64_t last) {
    const Source& source = sources[s];
    if (means[s] == nullptr) return;
    int64_t c = source.c, pixels = source.h * source.w;
    for_channels(c, [&](auto zero, int64_t i) {
      using T = decltype(zero);
      T mean = load<T>(call.norms[s].mean + i), r = load<T>(call.norms[s].r + i);
      T g_mean = load<T>(means[s] + i), gh_mean = load<T>(means[s] + c + i);
      for (int64_t j = first * pixels; j < last * pixels; ++j) {
        T h = (load<T>(source.x + j * c + i) - mean) * r;
        float* g = source.adjoint + j * c + i;
        store(g, r * (load<T>(g) - g_mean - h * gh_mean));
      }
    });
  });
}

// yd of every task that has room for it. Tangents that are null are zero.
extern "C" void darts_sepconv_tangent(const Source* sources, int64_t n_sources, const Task* tasks,
                                      int64_t n_tasks, int threads) {
  Call call(sources, n_sources, tasks, n_tasks);
  auto count_of = [&](int64_t s) { return double(sources[s].n * sources[s].h * sources[s].w); };

  // The sums of xd, h xd and of what `first` is for: G xd, G, G h
  ChannelSums before(call, 5);
  for_units(call, sources, threads, [&](int s, int64_t part, int64_t first, int64_t last) {
    const Source& source = sources[s];
    const Norm& norm = call.norms[s];
    if (source.x_tangent == nullptr || !norm.present || !norm.batch) return;
    int64_t c = source.c;
    for_channels(c, [&](auto zero, int64_t i) {
      using T = decltype(zero);
      T mean = load<T>(norm.mean + i), r = load<T>(norm.r + i);
      for (int64_t row = first * source.h; row < last * source.h; ++row) {
        T sum = {}, with_h = {}, with_g = {}, of_g = {}, of_gh = {};
        for (int64_t j = row * source.w; j < (row + 1) * source.w; ++j) {
          T xd = load_ahead<T>(source.x_tangent + j * c + i), h = (load_ahead<T>(source.x + j * c + i) - mean) * r;
          sum += xd;
          with_h += xd * h;
          if (source.first == nullptr) continue;
          T g = load_ahead<T>(source.first + j * c + i);
          with_g += xd * g, of_g += g, of_gh += g * h;
        }
        flush(before.at(s, part, 0) + i, sum);
        flush(before.at(s, part, 1) + i, with_h);
        if (source.first == nullptr) continue;
        flush(before.at(s, part, 2) + i, with_g);
        flush(before.at(s, part, 3) + i, of_g);
        flush(before.at(s, part, 4) + i, of_gh);
      }
    });
  });
  for (int64_t s = 0; s < n_sources; ++s) {
    const Norm& norm = call.norms[s];
    if (sources[s].x_tangent == nullptr || !norm.present || !norm.batch) continue;
    for (int64_t i = 0; i < sources[s].c; ++i) {
      auto mean_of = [&](int quantity) { return before.mean(int(s), call.parts[s], quantity, i, count_of(s)); };
      int64_t c = sources[s].c;
      float* bends = sources[s].bends + i;
      bends[MEAN_YD * c] = norm.xd_mean[i] = mean_of(0);
      bends[MEAN_H_YD * c] = norm.t[i] = mean_of(1);
      if (sources[s].first == nullptr) continue;
      double xd = norm.xd_mean[i], t = norm.t[i], g_xd = mean_of(2), g = mean_of(3), gh = mean_of(4);
      bends[MEAN_G_H * c] = float(gh), bends[MEAN_G * c] = float(g);
      bends[MEAN_G_HD * c] = float(norm.r[i] * (g_xd - g * xd - gh * t));
    }
  }

  struct Prepared {
    Stencil z, zd;      // D * a, and Dd * a + D * ad
    const float* both;  // [Pd P]: yd = Pd z + P zd
  };
  std::vector<Prepared> prepared;
  for (const Half& half : call.halves) {
    const Task& task = half.task;
    Prepared found;
    found.z = forward_stencil(half, {{true, task.d, 0}});
    found.zd = forward_stencil(half, {{task.d_tangent != nullptr, task.d_tangent, 0},
                                      {sources[task.source].x_tangent != nullptr, task.d, half.in.image}});
    ptrdiff_t inputs = half.cb * LANES * LANES;
    float* both = of_call.zeros(2 * half.kb * inputs);
    if (task.p_tangent) pack(task.p_tangent, half.k, half.c, false, both, 2 * inputs);
    pack(task.p, half.k, half.c, false, both + inputs, 2 * inputs);
    found.both = both;
    prepared.push_back(found);
  }
  for_units(call, sources, threads, [&](int s, int64_t, int64_t first, int64_t last) {
    const Source& source = sources[s];
    const Padded& in = call.inputs[s];
    bool tangent = source.x_tangent != nullptr;
    int64_t pixels_most = GROUP > in.w ? GROUP : in.w;
    float* a = of_worker.take((tangent ? 2 : 1) * in.image);
    float* z = of_worker.take(2 * in.blocks * LANES * pixels_most);
    for (int64_t image = first; image < last; ++image) {
      rectify(source, call.norms[s], in, image, tangent, a);
      for (int t : call.tasks[s]) {
        const Half& half = call.halves[t];
        const Prepared& of_task = prepared[t];
        for (int64_t y = 0; half.task.y && y < half.ho; y += half.group) {
          int64_t rows = y + half.group < half.ho ? half.group : half.ho - y, pixels = rows * half.wo;
          ptrdiff_t block = pixels * LANES;
          depthwise(half, of_task.z, a, y, rows, z, block);
          depthwise(half, of_task.zd, a, y, rows, z + half.cb * block, block);
          float* out = half.task.y + (image * half.ho + y) * half.wo * half.task.row;
          Sums unused = {};
          for (int b = 0; b < half.kb; ++b)
            pointwise_out(z, block, 2 * half.cb, of_task.both + ptrdiff_t(b) * 2 * half.cb * LANES * LANES,
                          out + b * LANES, half.task.row, lanes_of(half.k, b), pixels,
                          call.streamed, unused);
        }
      }
    }
  });
}

// The second adjoint of every source. Tangents and second adjoints that are null are zero.
extern "C" void darts_sepconv_second(const Source* sources, int64_t n_sources, const Task* tasks, int64_t n_tasks,
                                     int threads) {
  Call call(sources, n_sources, tasks, n_tasks);
  auto count_of = [&](int64_t s) { return double(sources[s].n * sources[s].h * sources[s].w); };
  std::vector<float*> first_adjoint(n_sources);  // G = [h > 0] of the first backward's, where it is needed
  for (int64_t s = 0; s < n_sources; ++s) {
    const Source& source = sources[s];
    if (source.x_tangent && call.norms[s].present && call.norms[s].batch && !source.factors)
      first_adjoint[s] = of_call.take(source.n * source.h * source.w * source.c);
    for (int64_t i = 0; source.bends && i < source.c; ++i) {
      call.norms[s].xd_mean[i] = source.bends[MEAN_YD * source.c + i];
      call.norms[s].t[i] = source.bends[MEAN_H_YD * source.c + i];
    }
  }
  struct Prepared {
    std::vector<Stencil> first, second;  // D' * Z, and Dd' * Z + D' * Zd
    const float *p, *pd;                 // transposed: Z = P' Y, Zd = P' Yd + Pd' Y
    Adjoint adjoint;
    bool z;                              // whether Z is needed
  };
  std::vector<Prepared> prepared;
  for (const Half& half : call.halves) {
    const Task& task = half.task;
    bool first = first_adjoint[task.source] != nullptr;
    prepared.push_back({first ? adjoint_stencils(half, {{true, task.d, 0}}) : std::vector<Stencil>(),
                        adjoint_stencils(half, {{task.d_tangent != nullptr, task.d_tangent, 0},
                                                {task.p_tangent || task.y_second, task.d, half.z.image}}),
                        packed(task.p, half.k, half.c, true), packed(task.p_tangent, half.k, half.c, true),
                        Adjoint(half), first || task.d_tangent});
  }

  ChannelSums sums(call, 5);  // of Q, Q h, G, G h, G hd; Q is the second adjoint of h
  for_units(call, sources, threads, [&](int s, int64_t part, int64_t first, int64_t last) {
    const Source& source = sources[s];
    const Padded& in = call.inputs[s];
    bool tangent = first_adjoint[s] != nullptr;
    int64_t pixels_most = GROUP > in.w ? GROUP : in.w, image_size = in.h * in.w * source.c;
    ptrdiff_t z_most = 0;
    int kb_most = 0;
    for (int t : call.tasks[s]) {
      if (call.halves[t].z.image > z_most) z_most = call.halves[t].z.image;
      if (call.halves[t].kb > kb_most) kb_most = call.halves[t].kb;
    }
    float* a = of_worker.take((tangent ? 2 : 1) * in.image);
    float* q = of_worker.zeros(in.blocks * in.h * in.w * LANES);
    float* g = of_worker.zeros(in.blocks * in.h * in.w * LANES);
    float* z_adjoint = of_worker.take(2 * z_most);
    float* scratch = of_worker.take(kb_most * LANES * pixels_most);
    for (int64_t image = first; image < last; ++image) {
      rectify(source, call.norms[s], in, image, tangent, a);
      bool add = false;
      for (int t : call.tasks[s]) {
        const Half& half = call.halves[t];
        const Task& task = half.task;
        const Prepared& of_task = prepared[t];
        float* zd_adjoint = z_adjoint + half.z.image;
        half.z.clear_border(z_adjoint);
        half.z.clear_border(zd_adjoint);
        for (int64_t y = 0; y < half.ho; y += half.group) {
          int64_t rows = y + half.group < half.ho ? half.group : half.ho - y, pixels = rows * half.wo;
          int64_t at = (image * half.ho + y) * half.wo;
          ptrdiff_t block = pixels * LANES;
          if (of_task.z || task.p_tangent) {
            const float* lanes = of_task.adjoint.lanes(at, pixels, false, scratch, block);
            if (of_task.z) adjoint_rows(half, of_task.p, lanes, block, y, rows, z_adjoint);
            if (task.p_tangent) adjoint_rows(half, of_task.pd, lanes, block, y, rows, zd_adjoint);
          }
          if (task.y_second)
            adjoint_rows(half, of_task.p, of_task.adjoint.lanes(at, pixels, true, scratch, block), block, y, rows,
                         zd_adjoint, task.p_tangent != nullptr);
        }
        adjoint(half, of_task.second, z_adjoint, q, add);
        if (first_adjoint[s]) adjoint(half, of_task.first, z_adjoint, g, add);
        add = true;
      }
      MaskedSums wanted = {};
      if (call.norms[s].present) wanted = {sums.at(s, part, 0), sums.at(s, part, 1), nullptr};
      mask_image(source, in, q, a, false, source.adjoint + image * image_size, call.streamed, wanted);
      if (first_adjoint[s])
        mask_image(source, in, g, a, true, first_adjoint[s] + image * image_size, call.streamed,
                   {sums.at(s, part, 2), sums.at(s, part, 3), sums.at(s, part, 4)});
    }
  });

  // B(Q) - r (t B(G) + s hd + u h), with t = mean(h xd), s = mean(G h) and u = mean(G hd)
  std::vector<float*> means(n_sources);
  for (int64_t s = 0; s < n_sources; ++s) {
    if (!call.norms[s].present) continue;
    means[s] = of_call.zeros(5 * sources[s].c);
    if (!call.norms[s].batch) continue;
    for (int64_t i = 0; i < sources[s].c; ++i)
      for (int quantity = 0; quantity < 5; ++quantity)
        means[s][quantity * sources[s].c + i] = sums.mean(int(s), call.parts[s], quantity, i, count_of(s));
    if (sources[s].factors == nullptr) continue;
    for (int64_t i = 0; i < sources[s].c; ++i)
      write_second_factors(sources[s].factors + i, sources[s].c, call.norms[s].r[i], call.norms[s].r[i], means[s][i],
                           means[s][sources[s].c + i], sources[s].bends ? sources[s].bends + i : nullptr,
                           call.norms[s].batch);
    means[s] = nullptr;
  }
  for_units(call, sources, threads, [&](int s, int64_t, int64_t first, int64_t last) {
    const Source& source = sources[s];
    const Norm& norm = call.norms[s];
    if (means[s] == nullptr) return;
    int64_t c = source.c, pixels = source.h * source.w;
    for_channels(c, [&](auto zero, int64_t i) {
      using T = decltype(zero);
      auto mean_of = [&](int quantity) { return load<T>(means[s] + quantity * c + i); };
      T mean = load<T>(norm.mean + i), r = load<T>(norm.r + i);
      T xd_mean = load<T>(norm.xd_mean + i), t = load<T>(norm.t + i);
      T q_mean = mean_of(0), qh = mean_of(1), g_mean = mean_of(2), gh = mean_of(3), ghd = mean_of(4);
      for (int64_t j = first * pixels; j < last * pixels; ++j) {
        T h = (load<T>(source.x + j * c + i) - mean) * r;
        float* at = source.adjoint + j * c + i;
        T found = load<T>(at) - q_mean - h * qh;
        if (first_adjoint[s]) {
          T hd = r * (load<T>(source.x_tangent + j * c + i) - xd_mean - h * t);
          found -= t * r * (load<T>(first_adjoint[s] + j * c + i) - g_mean - h * gh) + gh * hd + ghd * h;
        }
        store(at, r * found);
      }
    });
  });
}
