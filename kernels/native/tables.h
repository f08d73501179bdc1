// The tables that C++ reads, as kernels/native/table.py makes them: structures of addresses and whole numbers, every
// field 8 bytes wide. Names are those of kernels/types.py. Addresses that a function does not use are null.
#pragma once
#include <cstdint>

extern "C" {

// Rows of channels: the pixels of an image or of a slice of its channels, or the rows of statistics or of sums.
struct Matrix {
  float* data;     // null: it is absent
  int64_t stride;  // numbers from one row to the next

  float* row(int64_t i) const { return data + i * stride; }
};

// A Reader, and in the second sweep a SecondReader, of the channels of y that one task writes.
struct Reader {
  Matrix y, statistics;                          // as of a Source
  Matrix adjoint, sums;                          // G; the sums of G and G h
  const float* weight;                           // p; null: 1
  Matrix tangent, tangent_sums, second, second_sums;  // yd, like y; the sums of yd, yd h, yd G, G; Gd; of Gd, Gd h
};

// Separable halves

struct Source {
  const float* x;     // [n, h, w, c]
  Matrix statistics;  // mean, variance, r; null: x is read as it is
  const float* tangent;
  float* adjoint;  // H, or in the second sweep Hd
  Matrix sums;     // that the sweep writes; null: they are not wanted
  int64_t n, h, w, c;
};

struct Task {
  int64_t source, kernel, stride, dilation, offset, k;  // kernel 0: no depthwise convolution; k: channels of y
  const float *d, *p, *d_tangent, *p_tangent;           // [c, 1, kernel, kernel] and [k, c]
  Matrix y, statistics;                                 // written: y or its tangent; null: not wanted
  Reader reader;                                        // in both backward sweeps
  float *p_gradient, *d_gradient;                       // [k, c] and [c, kernel, kernel]; null: not wanted
};

struct SepConv {
  const Source* sources;
  int64_t n_sources;
  const Task* tasks;
  int64_t n_tasks;
};

// A node, or one batch norm

struct Candidate {
  const float* y;     // [m, c]
  Matrix statistics;  // null: h is y
  const float* weight;  // p; null: 1
  const float* tangent;
};

struct Mix {
  const Candidate* candidates;
  int64_t count, m, c;
  Matrix adjoint;  // G, or in the second sweep Gd
  const Matrix* outs;
  int64_t n_outs;
  Matrix sums, tangent_sums;  // rows [count, c]: of G, G h, or of Gd, Gd h; of yd, yd h, yd G, G
  float* weight_gradient;     // [count]; null: not wanted
  const float* gradient_before;
};

// Tensors that several nodes read

struct Shared {
  const float* y;     // [m, c]
  const Reader* readers;
  int64_t n_readers;
  float* out;
};

struct FanOut {
  const Shared* tensors;
  int64_t count, m, c;
};

struct Sum {
  const Matrix* terms;
  int64_t n_terms;
  float* out;  // [m, c]
  int64_t m, c;
};

struct Pool {
  float* x;                  // [n, h, w, c]: the image, its tangent or its adjoint
  float *maximum, *average;  // [n, ho, wo, c]
  uint8_t* position;         // of the maximum in its window, row-major: 0 to 8
  float* statistics;         // [2, 3, c]; null: not wanted
  const Matrix* terms;       // which are added to the adjoint
  int64_t n_terms;
  int64_t n, h, w, c, stride;
};

// A sweep is a list of these.
struct Record {
  void (*function)(const void* call, int threads);
  const void* call;  // the structure that the function takes
};
}
