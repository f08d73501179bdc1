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

// acc[b][j] = sum over channels c of weights[c] * z[j][c] for B blocks of output channels, whose weights
// [inputs.blocks * LANES][LANES] are one behind the other. With two blocks a value of z is loaded once for both: 6
// loads for 8 multiply-adds (8 lanes) in place of 9.
template <int T, int B>
INLINE void pointwise_tile(const float* z, Inputs inputs, const float* weights, V (&acc)[B][T]) {
  UNROLL for (int b = 0; b < B; ++b)
    UNROLL for (int j = 0; j < T; ++j) acc[b][j] = V{};
  ptrdiff_t next = inputs.blocks * LANES * LANES;
  for (int i = 0; i < inputs.blocks; ++i, z += inputs.block, weights += LANES * LANES)
    for (int l = 0; l < inputs.lanes; ++l) {
      V w[B];
      UNROLL for (int b = 0; b < B; ++b) w[b] = load(weights + b * next + l * LANES);
      UNROLL for (int j = 0; j < T; ++j)
        UNROLL for (int b = 0; b < B; ++b) acc[b][j] += w[b] * z[j * LANES + l];
    }
}

template <int T, int B>
INLINE void pointwise_store(const float* z, Inputs inputs, const float* weights, float* out, ptrdiff_t out_block,
                            bool add) {
  V acc[B][T];
  pointwise_tile<T, B>(z, inputs, weights, acc);
  UNROLL for (int b = 0; b < B; ++b, out += out_block) {
    if (add) UNROLL for (int j = 0; j < T; ++j) acc[b][j] += load(out + j * LANES);
    UNROLL for (int j = 0; j < T; ++j) store(out + j * LANES, acc[b][j]);
  }
}

// B blocks of output channels of n pixels, `out_block` apart, written in lanes or added to what is there.
template <int B>
void pointwise(const float* z, Inputs inputs, const float* weights, float* out, ptrdiff_t out_block, int64_t n,
               bool add) {
  constexpr int T = TILE / B;
  int64_t j = 0;
  for (; j + T <= n; j += T)
    pointwise_store<T, B>(z + j * LANES, inputs, weights, out + j * LANES, out_block, add);
  for (; j + 4 <= n; j += 4)
    pointwise_store<4, B>(z + j * LANES, inputs, weights, out + j * LANES, out_block, add);
  for (; j + 2 <= n; j += 2)
    pointwise_store<2, B>(z + j * LANES, inputs, weights, out + j * LANES, out_block, add);
  for (; j < n; ++j) pointwise_store<1, B>(z + j * LANES, inputs, weights, out + j * LANES, out_block, add);
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
template <int T, int B, class Lanes, class AnySums>
INLINE void pointwise_sum(const float* z, Inputs inputs, const float* weights, float* y, int64_t k, Lanes lanes,
                          bool streamed, int64_t first, AnySums (&sums)[B]) {
  V acc[B][T];
  z += first * LANES, y += first * k;
  pointwise_tile<T, B>(z, inputs, weights, acc);
  UNROLL for (int b = 0; b < B; ++b, y += LANES) {
    if (streamed) {
      UNROLL for (int j = 0; j < T; ++j) stream(y + j * k, acc[b][j]);
    } else {
      UNROLL for (int j = 0; j < T; ++j) store(lanes, y + j * k, acc[b][j]);
    }
    UNROLL for (int j = 0; j < T; ++j) sums[b].add(first + j, acc[b][j]);
  }
}

// B blocks of output channels of n pixels, written into y, pixels k apart, and the sums of each, to which pixels are
// added by their numbers.
template <int B, class Lanes, class AnySums>
void pointwise_out(const float* z, Inputs inputs, const float* weights, float* y, int64_t k,
                   Lanes lanes, int64_t n, bool streamed, AnySums (&sums)[B]) {
  streamed = streamed && lanes.count == LANES && k % LANES == 0 && aligned(y);
  constexpr int T = TILE / B;
  int64_t j = 0;
  for (; j + T <= n; j += T)
    pointwise_sum<T, B>(z, inputs, weights, y, k, lanes, streamed, j, sums);
  for (; j + 4 <= n; j += 4)
    pointwise_sum<4, B>(z, inputs, weights, y, k, lanes, streamed, j, sums);
  for (; j < n; ++j)
    pointwise_sum<1, B>(z, inputs, weights, y, k, lanes, streamed, j, sums);
}

// Calls body(number of blocks, lanes, first channel) for two whole blocks of channels at a time, then for what is left.
template <class Body>
INLINE void for_blocks(int64_t c, const Body& body) {
  int64_t i = 0;
  for (; i + 2 * LANES <= c; i += 2 * LANES) body(std::integral_constant<int, 2>{}, All{}, i);
  for_channels(c - i, [&](auto lanes, int64_t more) { body(std::integral_constant<int, 1>{}, lanes, i + more); });
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
  constexpr int ROWS = LANES == 16 || K == 3 ? K : 2;  // 25 sums do not fit 16 registers; 15 were no faster
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
