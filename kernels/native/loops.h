// The four loops over registers of which separable convolutions consist:
//
//     stencil    a depthwise convolution as a list of offsets and weights, so that any kernel size, dilation and
//                stride, their adjoints, and sums of two convolutions are the same loop
//     pointwise  a pointwise convolution
//     outer      the gradient of the pointwise weights
//     correlate  the gradient of the depthwise weights
#pragma once
#include "lanes.h"
#include "tables.h"

namespace {

template <int T, int STEP>
INLINE void stencil_tile(const float* in, const ptrdiff_t* offsets, const float* weights, int taps,
                         float* out, ptrdiff_t out_step, bool add) {
  V acc[T];
  UNROLL for (int j = 0; j < T; ++j) acc[j] = add ? load(out + j * out_step) : V{};
  for (int t = 0; t < taps; ++t) {
    const float* p = in + offsets[t];
    V w = load(weights + t * LANES);
    UNROLL for (int j = 0; j < T; ++j) acc[j] += w * load(p + j * STEP * LANES);
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

// The same where taps stand in runs of RUN taps, SPACING pixels apart: each pixel is loaded once a run and not once
// a tap, which is 1.4 times as fast (3x3 and 5x5, 16 lanes).
template <int T, int RUN, int SPACING>
INLINE void runs_tile(const float* in, const ptrdiff_t* offsets, const float* weights, int taps, float* out,
                      ptrdiff_t out_step, bool add) {
  V acc[T];
  UNROLL for (int j = 0; j < T; ++j) acc[j] = add ? load(out + j * out_step) : V{};
  for (int t = 0; t < taps; t += RUN, weights += RUN * LANES) {
    const float* p = in + offsets[t];
    V w[RUN];
    UNROLL for (int k = 0; k < RUN; ++k) w[k] = load(weights + k * LANES);
    UNROLL for (int i = 0; i < T + (RUN - 1) * SPACING; ++i) {
      V x = load(p + i * LANES);
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
  int run = 1, spacing = 0;  // taps stand in runs of `run` taps, `spacing` pixels apart

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
  for (int64_t j = 0; j < n; ++j)  // any other stride, which the search space does not have
    stencil_tile<1, 1>(in + j * step * LANES, offsets, weights, taps, out + j * out_step, out_step, add);
}

// The input of a pointwise convolution: blocks of channels, `block` apart, of which the first `lanes` are not zero.
struct Inputs {
  ptrdiff_t block;
  int blocks, lanes;

  Inputs(ptrdiff_t block, int blocks, int64_t channels)
      : block(block), blocks(blocks), lanes(channels < LANES ? int(channels) : LANES) {}
};

// acc[j] = sum over channels c of weights[c] * z[j][c], weights [blocks * LANES][LANES].
template <int T>
INLINE void pointwise_tile(const float* z, Inputs inputs, const float* weights, V (&acc)[T]) {
  UNROLL for (int j = 0; j < T; ++j) acc[j] = V{};
  for (int b = 0; b < inputs.blocks; ++b, z += inputs.block, weights += LANES * LANES)
    for (int l = 0; l < inputs.lanes; ++l) {
      V w = load(weights + l * LANES);
      UNROLL for (int j = 0; j < T; ++j) acc[j] += w * z[j * LANES + l];
    }
}

template <int T>
INLINE void pointwise_store(const float* z, Inputs inputs, const float* weights, float* out,
                            bool add) {
  V acc[T];
  pointwise_tile<T>(z, inputs, weights, acc);
  if (add) UNROLL for (int j = 0; j < T; ++j) acc[j] += load(out + j * LANES);
  UNROLL for (int j = 0; j < T; ++j) store(out + j * LANES, acc[j]);
}

// One block of output channels of n pixels, written in lanes or added to what is there.
void pointwise(const float* z, Inputs inputs, const float* weights, float* out, int64_t n,
               bool add) {
  int64_t j = 0;
  for (; j + TILE <= n; j += TILE)
    pointwise_store<TILE>(z + j * LANES, inputs, weights, out + j * LANES, add);
  for (; j + 8 <= n; j += 8)
    pointwise_store<8>(z + j * LANES, inputs, weights, out + j * LANES, add);
  for (; j + 4 <= n; j += 4)
    pointwise_store<4>(z + j * LANES, inputs, weights, out + j * LANES, add);
  for (; j + 2 <= n; j += 2)
    pointwise_store<2>(z + j * LANES, inputs, weights, out + j * LANES, add);
  for (; j < n; ++j) pointwise_store<1>(z + j * LANES, inputs, weights, out + j * LANES, add);
}

// Sums over pixels of a block of channels, of differences from the shift.
struct Sums {
  V shift, sum, squares;

  __attribute__((always_inline)) void add(int64_t, V y) {
    V d = y - shift;
    sum += d;
    squares += d * d;
  }
};

// T pixels from number `first` on
template <int T, class Lanes, class AnySums>
INLINE void pointwise_sum(const float* z, Inputs inputs, const float* weights, float* y, int64_t k, Lanes lanes,
                          bool streamed, int64_t first, AnySums& sums) {
  V acc[T];
  z += first * LANES, y += first * k;
  pointwise_tile<T>(z, inputs, weights, acc);
  if (streamed) {
    UNROLL for (int j = 0; j < T; ++j) stream(y + j * k, acc[j]);
  } else {
    UNROLL for (int j = 0; j < T; ++j) store(lanes, y + j * k, acc[j]);
  }
  UNROLL for (int j = 0; j < T; ++j) sums.add(first + j, acc[j]);
}

// One block of output channels of n pixels, written into y, pixels k apart, and their sums, to which pixels are added
// by their numbers.
template <class Lanes, class AnySums>
void pointwise_out(const float* z, Inputs inputs, const float* weights, float* y, int64_t k,
                   Lanes lanes, int64_t n, bool streamed, AnySums& sums) {
  streamed = streamed && lanes.count == LANES && k % LANES == 0 && aligned(y);
  int64_t j = 0;
  for (; j + TILE <= n; j += TILE)
    pointwise_sum<TILE>(z, inputs, weights, y, k, lanes, streamed, j, sums);
  for (; j + 8 <= n; j += 8)
    pointwise_sum<8>(z, inputs, weights, y, k, lanes, streamed, j, sums);
  for (; j < n; ++j)
    pointwise_sum<1>(z, inputs, weights, y, k, lanes, streamed, j, sums);
}

// found[c][.] += sum over n pixels of z[c] * y[.], of the first C channels c of a block
template <int C>
void outer(const float* y, const float* z, int64_t n, float* found) {
  V acc[C];
  UNROLL for (int l = 0; l < C; ++l) acc[l] = load(found + l * LANES);
  for (int64_t j = 0; j < n; ++j, y += LANES, z += LANES) {
    V v = load(y);
    UNROLL for (int l = 0; l < C; ++l) acc[l] += v * z[l];
  }
  UNROLL for (int l = 0; l < C; ++l) store(found + l * LANES, acc[l]);
}

INLINE void outer(const float* y, const float* z, int64_t n, int64_t channels, float* found) {
  if (channels <= LANES / 4) return outer<LANES / 4>(y, z, n, found);
  if (channels <= LANES / 2) return outer<LANES / 2>(y, z, n, found);
  outer<LANES>(y, z, n, found);
}

// found[ky][kx] += sum over rows and n columns of z[row][x] * a[row][x * STEP + ky, kx], ROWS kernel rows.
template <int ROWS, int K, int DILATION, int STEP>
void correlate_rows(const float* z, ptrdiff_t z_row, const float* a, ptrdiff_t a_row, ptrdiff_t kernel_row,
                    int64_t rows, int64_t n, float* found) {
  V acc[ROWS * K];
  UNROLL for (int t = 0; t < ROWS * K; ++t) acc[t] = load(found + t * LANES);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t x = 0; x < n; ++x) {
      V v = load(z + row * z_row + x * LANES);
      const float* p = a + row * a_row + x * STEP * LANES;
      UNROLL for (int ky = 0; ky < ROWS; ++ky)
        UNROLL for (int kx = 0; kx < K; ++kx)
          acc[ky * K + kx] += v * load(p + ky * kernel_row + kx * DILATION * LANES);
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
  for (int64_t t = 0; t < task.kernel * task.kernel; ++t) {  // any other kernel, which the search space does not have
    V sum = load(found + t * LANES);
    const float* p = a + t / task.kernel * kernel_row + t % task.kernel * task.dilation * LANES;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t x = 0; x < n; ++x)
        sum += load(z + row * z_row + x * LANES) * load(p + row * a_row + x * task.stride * LANES);
    store(found + t * LANES, sum);
  }
}

}  // namespace
