// The adjoint of a tensor y, computed from the adjoint G of its batch norm: gamma B(p G), and in the second sweep the
// derivative of p B(G) along v. Both are sums of tensors with a factor for each channel:
//
//     OF_G G + OF_Y (y - mean) + OF_ONE
//     OF_G Gd + OF_Y (y - mean) + OF_ONE + OF_FIRST G + OF_TANGENT yd
//
// The mean is subtracted from y first: as a part of OF_ONE it would cancel, and lose digits.
//
// Where p is by image, OF_G is to be multiplied by it.
//
// And the sums of the tangent yd, which the derivative along v needs.
#pragma once
#include "lanes.h"
#include "tables.h"

namespace {

enum { OF_G, OF_Y, OF_ONE, OF_FIRST, OF_TANGENT, FACTORS };

// The rows of sums: of G, G h; of yd, yd h, yd G
enum { SUM_G, SUM_G_H };
enum { SUM_YD, SUM_YD_H, SUM_YD_G, TANGENT_SUMS };

// The rows of statistics
enum { MEAN, VARIANCE, R };

struct Factors {
  V g, y, one, first, tangent, mean;

  // `factors` points to the first of these channels; its rows are `row` apart.
  Factors(const float* factors, int64_t row, V mean)
      : g(load(factors + OF_G * row)), y(load(factors + OF_Y * row)),
        one(load(factors + OF_ONE * row)), first(load(factors + OF_FIRST * row)),
        tangent(load(factors + OF_TANGENT * row)), mean(mean) {}
  __attribute__((always_inline)) V of(V of_g, V of_y) const { return g * of_g + (y * (of_y - mean) + one); }
  __attribute__((always_inline)) V of(V of_g, V of_y, V of_first, V of_tangent) const {
    return first * of_first + (tangent * of_tangent + of(of_g, of_y));
  }
};

// p of an image
INLINE float weight_of(const Matrix& weight, int64_t image) { return weight.data ? *weight.row(image) : 1.f; }

inline bool by_image(const Matrix& weight) { return weight.data && weight.stride; }

// Writes the factors of c channels, whose sums are over m pixels, into rows that are `row` apart. Without statistics
// OF_G is p and the others are 0.
//
//     p B(G) = p r (G - mean(G) - h mean(G h)),    h = r (y - mean(y)); with gamma, times gamma
//     p ( B(Gd) - r (t B(G) + s hd + u h) ),       hd = r (yd - mean(yd) - h t)
//
// with t = mean(h yd), s = mean(G h) and u = mean(G hd) = r (mean(G yd) - mean(G) mean(yd) - s t)
inline void write_factors(const Reader& reader, int64_t c, double m, bool second, float* into, int64_t row) {
  double p = by_image(reader.weight) ? 1.0 : double(weight_of(reader.weight, 0));
  for (int64_t i = 0; i < c; ++i, ++into) {
    double of_g = p, of_y = 0, of_one = 0, of_first = 0, of_tangent = 0;
    if (reader.statistics.data) {
      auto mean_of = [&](const Matrix& sums, int quantity) { return double(sums.row(quantity)[i]) / m; };
      double r = double(reader.statistics.row(R)[i]), g = mean_of(reader.sums, SUM_G);
      double s = mean_of(reader.sums, SUM_G_H);
      of_g = reader.gamma ? p * r * double(reader.gamma[i]) : p * r;
      if (second) {
        double yd = mean_of(reader.tangent_sums, SUM_YD), t = mean_of(reader.tangent_sums, SUM_YD_H);
        double u = r * (mean_of(reader.tangent_sums, SUM_YD_G) - g * yd - s * t);
        of_first = -of_g * r * t, of_tangent = -of_g * r * s;
        of_y = of_g * r * (2 * r * s * t - mean_of(reader.second_sums, SUM_G_H) - u);
        of_one = -of_g * mean_of(reader.second_sums, SUM_G) - of_first * g - of_tangent * yd;
      } else {
        of_y = -of_g * r * s, of_one = -of_g * g;
      }
    }
    into[OF_G * row] = float(of_g), into[OF_Y * row] = float(of_y), into[OF_ONE * row] = float(of_one);
    into[OF_FIRST * row] = float(of_first), into[OF_TANGENT * row] = float(of_tangent);
  }
}

// The sums of yd, yd (y - mean) and yd G over pixels from number `pixel` on, of the channels from i on
template <class Lanes>
class TangentSums {
 public:
  TangentSums(Lanes lanes, const Reader& reader, int64_t pixel, int64_t i)
      : lanes_(lanes), y_(reader.y.row(pixel) + i), g_(reader.adjoint.row(pixel) + i), y_stride_(reader.y.stride),
        g_stride_(reader.adjoint.stride) {
    if (reader.statistics.data) mean_ = load(lanes, reader.statistics.row(MEAN) + i);
  }

  __attribute__((always_inline)) void add(int64_t j, V yd) {
    sum_ += yd;
    with_y_ += yd * (load_ahead(lanes_, y_ + j * y_stride_) - mean_);
    with_g_ += yd * load_ahead(lanes_, g_ + j * g_stride_);
  }

  // Adds them to those in double, [TANGENT_SUMS][row].
  void flush_into(double* sums, int64_t row) const {
    flush(lanes_, sums + SUM_YD * row, sum_);
    flush(lanes_, sums + SUM_YD_H * row, with_y_);
    flush(lanes_, sums + SUM_YD_G * row, with_g_);
  }

 private:
  Lanes lanes_;
  const float *y_, *g_;
  int64_t y_stride_, g_stride_;
  V mean_ = {}, sum_ = {}, with_y_ = {}, with_g_ = {};
};

// Writes the sums of a tangent for one of its readers, of c channels.
inline void write_tangent_sums(const Reader& reader, int64_t c, const double* of_yd, const double* with_y,
                               const double* with_g) {
  for (int64_t i = 0; i < c; ++i) {
    double r = reader.statistics.data ? double(reader.statistics.row(R)[i]) : 1.0;
    reader.tangent_sums.row(SUM_YD)[i] = float(of_yd[i]);
    reader.tangent_sums.row(SUM_YD_H)[i] = float(with_y[i] * r);
    reader.tangent_sums.row(SUM_YD_G)[i] = float(with_g[i]);
  }
}

}  // namespace
