// The tables that kernels/native/table.py makes: structures of addresses and whole numbers, every field 8 bytes
// wide. Names are those of kernels/types.py. Addresses that a function does not use are null.
#pragma once
#include <cstdint>

class Team;  // team.h

extern "C" {

// Rows of channels: the pixels of an image or of a slice of its channels, or the rows of statistics or of sums.
struct Matrix {
  float* data;     // null: it is absent
  int64_t stride;  // numbers from one row to the next

  float* row(int64_t i) const { return data + i * stride; }
};

// What reads a tensor y, or the channels of it that one task writes.
struct Reader {
  Matrix y, statistics;  // without statistics both backward sweeps do not read y
  Matrix adjoint, sums;  // G; the sums of G, G u, where p is by image of p G, p G u
  Matrix weight;         // p, a number a row, which is an image's; all images have one if the stride is 0; null: 1
  const float* gamma;    // [c]; null: 1
  Matrix tangent;        // yd, whose pixels are as far apart as those of y
  Matrix tangent_sums;   // the sums of yd, yd h, yd G, which the tangent sweep writes
  // Of the second backward sweep:
  Matrix second, second_sums;  // Gd; the sums of Gd, Gd h
};

// Separable halves

struct Source {
  const float* x;        // [n, h, w, c]
  Matrix statistics;     // mean, variance, r; null: x is read as it is
  Matrix affine;         // gamma, beta; null: 1, 0
  const float* tangent;  // xd
  Matrix tangent_sums;   // the sums of xd, xd h
  const Matrix* terms;   // what is added to its adjoint
  int64_t n_terms;
  float* adjoint;        // H, or in the second backward sweep Hd
  Matrix sums;           // the sums of H, H u, or of Hd, Hd h; null: they are not wanted
  int64_t n, h, w, c;
};

struct Task {
  int64_t source, kernel, stride, dilation, offset, k;  // kernel 0: no depthwise convolution; k: channels of y
  const float *d, *p, *d_tangent, *p_tangent;           // [c, 1, kernel, kernel] and [k, c]
  Matrix y, statistics;                                 // of y or its tangent; null: they are not wanted
  Reader reader;                                        // of y, in all sweeps but the forward one
  float *p_gradient, *d_gradient;                       // [k, c] and [c, kernel, kernel]; null: they are not wanted
};

struct SepConv {
  const Source* sources;
  int64_t n_sources;
  const Task* tasks;
  int64_t n_tasks;
};

// A node, or one batch norm

struct Candidate {
  const float* y;        // [m, c]
  Matrix statistics;     // null: h is y
  Matrix affine;         // gamma, beta; null: 1, 0
  Matrix weight;         // p, as in Reader
  const float* tangent;  // yd
};

struct Mix {
  const Candidate* candidates;
  int64_t count, m, c, pixels;  // pixels of an image
  Matrix adjoint;  // G, or in the second backward sweep Gd
  const Matrix* outs;
  int64_t n_outs;
  // Sums, whose rows are [count, c]: of the adjoint, the adjoint times u; of G, G u; of yd, yd h, yd G
  Matrix sums, first_sums, tangent_sums;
  float* products;         // [count, c]: the sums of yd G, of candidates without statistics
  float* weight_gradient;  // [count]; null: it is not wanted
};

// Tensors that several nodes read

struct Shared {
  const float* y;  // [m, c]
  const Reader* readers;
  int64_t n_readers;
  float* out;  // [m, c]: its adjoint, or the second one
};

struct FanOut {
  const Shared* tensors;
  int64_t count, m, c, pixels;  // pixels of an image
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
  uint8_t* position;         // of the maximum in its window, 0 to 8, row-major
  float* statistics;         // [2, 3, c]; null: they are not wanted
  const Matrix* terms;       // other adjoints of the image, which are added
  int64_t n_terms;
  // In the tangent sweep: the readers of the maximum and behind them those of the average, and how many they are
  const Reader* readers;
  int64_t of_maximum, of_average;
  int64_t n, h, w, c, stride;
};

// A sweep is a list of these.
struct Record {
  void (*function)(const void* call, Team& team);
  const void* call;  // the structure that the function takes
};
}
