// 3x3 max and average pool of an image (padding 1, over the pixels that are there), in one pass over it.
#include "reader.h"
#include "team.h"

namespace {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

INLINE void store_bytes(All, uint8_t* p, VI v) {
  Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
}

INLINE void store_bytes(Some lanes, uint8_t* p, VI v) {
  Bytes bytes = __builtin_convertvector(v, Bytes);
  copy_some<LANES>(p, &bytes, lanes.count);
}

INLINE VI load_bytes(All, const uint8_t* p) {
  VI v;
  UNROLL for (int l = 0; l < LANES; ++l) v[l] = p[l];  // one instruction; __builtin_convertvector made 66
  return v;
}

INLINE VI load_bytes(Some lanes, const uint8_t* p) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (VI)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(__mmask16((1u << lanes.count) - 1), p));
#else
  VI v = {};
  for (int l = 0; l < lanes.count; ++l) v[l] = p[l];
  return v;
#endif
}

// The pixels of a window in one direction: those from `from` on, before `to`
struct Window {
  int64_t from, to;
  Window(int64_t out, int64_t stride, int64_t size)
      : from(out * stride - 1 < 0 ? 0 : out * stride - 1), to(out * stride + 2 < size ? out * stride + 2 : size) {}
  int64_t count() const { return to - from; }
};

// The windows that hold a pixel, in one direction: those from `from` on, before `to`
struct Windows {
  int64_t from, to;
  Windows(int64_t in, int64_t stride, int64_t count) : from((in - 1 + stride - 1) / stride), to((in + 1) / stride + 1) {
    if (in < 1) from = 0;
    if (to > count) to = count;
  }
};

struct PoolSums {
  V shift, sum, squares;
  void add(V v) {
    V d = v - shift;
    sum += d, squares += d * d;
  }
};

}  // namespace

extern "C" void darts_pool_forward(const void* table, Team& team) {
  const Pool& q = *static_cast<const Pool*>(table);
  int64_t ho = (q.h - 1) / q.stride + 1, wo = (q.w - 1) / q.stride + 1;
  Parts parts(q.n);
  of_call.reset();
  double* sums = of_call.zeros<double>(parts.count * 6 * q.c);  // [part][pool][shift, sum, squares][c]
  team.each(parts.count, [&](int64_t part) {
    int64_t first = part * parts.size, last = first + parts.size < q.n ? first + parts.size : q.n;
    for (int64_t row = first * ho; row < last * ho; ++row) {
      const float* x = q.x + row / ho * q.h * q.w * q.c;
      Window wy(row % ho, q.stride, q.h);
      for_channels(q.c, [&](auto lanes, int64_t i) {
        PoolSums found[2] = {};
        double* of_part = sums + part * 6 * q.c + i;
        for (int64_t ox = 0; ox < wo; ++ox) {
          Window wx(ox, q.stride, q.w);
          V maximum = load(lanes, x + (wy.from * q.w + wx.from) * q.c + i), sum = {};
          VI position = VI{} + int32_t((wy.from - (row % ho * q.stride - 1)) * 3 + wx.from - (ox * q.stride - 1));
          for (int64_t y = wy.from; y < wy.to; ++y)
            for (int64_t xx = wx.from; xx < wx.to; ++xx) {
              V v = load(lanes, x + (y * q.w + xx) * q.c + i);
              VI at = VI{} + int32_t((y - (row % ho * q.stride - 1)) * 3 + xx - (ox * q.stride - 1));
              sum += v;
              auto better = (v > maximum) | (v != v);  // NaN is the maximum
              maximum = better ? v : maximum;
              position = better ? at : position;
            }
          V average = sum * (1.f / float(wy.count() * wx.count()));
          int64_t out = (row * wo + ox) * q.c + i;
          store(lanes, q.maximum + out, maximum);
          store(lanes, q.average + out, average);
          store_bytes(lanes, q.position + out, position);
          if (ox == 0) {
            if (row == first * ho) flush(lanes, of_part, maximum), flush(lanes, of_part + 3 * q.c, average);
            found[0].shift = narrow(lanes, of_part), found[1].shift = narrow(lanes, of_part + 3 * q.c);
          }
          found[0].add(maximum);
          found[1].add(average);
        }
        for (int pool = 0; pool < 2; ++pool) {
          flush(lanes, of_part + (pool * 3 + 1) * q.c, found[pool].sum);
          flush(lanes, of_part + (pool * 3 + 2) * q.c, found[pool].squares);
        }
      });
    }
  });
  for (int pool = 0; pool < 2; ++pool)
    for (int64_t i = 0; q.statistics && i < q.c; ++i) {
      Moments moments;
      for (int64_t part = 0; part < parts.count; ++part) {
        int64_t images = part + 1 < parts.count ? parts.size : q.n - part * parts.size;
        const double* at = sums + (part * 6 + pool * 3) * q.c + i;
        moments.merge(double(images * ho * wo), at[0], at[q.c], at[2 * q.c]);
      }
      float* into = q.statistics + pool * 3 * q.c + i;
      into[0] = float(moments.mean), into[q.c] = moments.variance(), into[2 * q.c] = moments.r();
    }
}

// The adjoint of x. Every pixel adds its part of the adjoints of all windows that hold it.
extern "C" void darts_pool_backward(const void* table, Team& team) {
  const Pool& q = *static_cast<const Pool*>(table);
  int64_t ho = (q.h - 1) / q.stride + 1, wo = (q.w - 1) / q.stride + 1;
  auto of_row = [&](int64_t row) {
    int64_t y = row % q.h, image = row / q.h;
    Windows wy(y, q.stride, ho);
    for_channels(q.c, [&](auto lanes, int64_t i) {
      bool inner = q.stride == 1 && y >= 2 && y < q.h - 2;
      float* into = q.x + row * q.w * q.c + i;
      for (int64_t k = 0; k < q.n_terms; ++k) {
        const float* term = q.terms[k].row(row * q.w) + i;
        int64_t stride = q.terms[k].stride;
        for (int64_t x = 0; x < q.w; ++x, term += stride)
          store(lanes, into + x * q.c, (k ? load(lanes, into + x * q.c) : V{}) + load_ahead(lanes, term));
      }
      for (int64_t x = 0; x < q.w; ++x, into += q.c) {
        V terms = q.n_terms ? load(lanes, into) : V{};
        if (inner && x >= 2 && x < q.w - 2) {  // nine whole windows, in half the time of the general case
          V of_maximum = {}, of_average = {};
          UNROLL for (int dy = -1; dy <= 1; ++dy)
            UNROLL for (int dx = -1; dx <= 1; ++dx) {
              int64_t at = ((row + dy) * q.w + x + dx) * q.c + i;
              VI here = VI{} + ((1 - dy) * 3 + 1 - dx);
              of_maximum += load_bytes(lanes, q.position + at) == here ? load(lanes, q.maximum + at) : V{};
              of_average += load(lanes, q.average + at);
            }
          store(lanes, into, terms + of_maximum + of_average * (1.f / 9.f));
          continue;
        }
        Windows wx(x, q.stride, wo);
        V sum = {};
        for (int64_t oy = wy.from; oy < wy.to; ++oy)
          for (int64_t ox = wx.from; ox < wx.to; ++ox) {
            int64_t at = ((image * ho + oy) * wo + ox) * q.c + i;
            VI here = VI{} + int32_t((y - (oy * q.stride - 1)) * 3 + x - (ox * q.stride - 1));
            sum += load_bytes(lanes, q.position + at) == here ? load(lanes, q.maximum + at) : V{};
            int64_t count = Window(oy, q.stride, q.h).count() * Window(ox, q.stride, q.w).count();
            sum += load(lanes, q.average + at) * (1.f / float(count));
          }
        store(lanes, into, terms + sum);
      }
    });
  };
  Parts parts(q.n * q.h);
  team.each(parts.count, [&](int64_t part) {
    for (int64_t row = part * parts.size; row < (part + 1) * parts.size && row < q.n * q.h; ++row) of_row(row);
  });
}

// The tangents of both pools, from that of x, and their sums
extern "C" void darts_pool_tangent(const void* table, Team& team) {
  const Pool& q = *static_cast<const Pool*>(table);
  int64_t ho = (q.h - 1) / q.stride + 1, wo = (q.w - 1) / q.stride + 1;
  Parts parts(q.n);
  int64_t n_readers = q.of_maximum + q.of_average, width = n_readers * TANGENT_SUMS * q.c;
  of_call.reset();
  double* sums = of_call.zeros<double>(parts.count * width);  // [part][reader][TANGENT_SUMS][c]
  // The first reader of a pool has the sums of yd, yd h of all its readers.
  auto first_of_pool = [&](int64_t k) { return k < q.of_maximum ? 0 : q.of_maximum; };
  team.each(parts.count, [&](int64_t part) {
    int64_t first = part * parts.size, last = first + parts.size < q.n ? first + parts.size : q.n;
    for (int64_t row = first * ho; row < last * ho; ++row) {
      const float* x = q.x + row / ho * q.h * q.w * q.c;
      Window wy(row % ho, q.stride, q.h);
      for_channels(q.c, [&](auto lanes, int64_t i) {
        for (int64_t ox = 0; ox < wo; ++ox) {
          Window wx(ox, q.stride, q.w);
          int64_t out = (row * wo + ox) * q.c + i;
          VI position = load_bytes(lanes, q.position + out);
          V maximum = {}, sum = {};
          for (int64_t y = wy.from; y < wy.to; ++y)
            for (int64_t xx = wx.from; xx < wx.to; ++xx) {
              V v = load(lanes, x + (y * q.w + xx) * q.c + i);
              VI at = VI{} + int32_t((y - (row % ho * q.stride - 1)) * 3 + xx - (ox * q.stride - 1));
              sum += v;
              maximum = position == at ? v : maximum;
            }
          store(lanes, q.maximum + out, maximum);
          store(lanes, q.average + out, sum * (1.f / float(wy.count() * wx.count())));
        }
        for (int64_t k = 0; k < n_readers; ++k) {
          const Reader& reader = q.readers[k];
          const float* yd = (k < q.of_maximum ? q.maximum : q.average) + row * wo * q.c + i;
          double* into = sums + part * width + k * TANGENT_SUMS * q.c + i;
          if (k == first_of_pool(k)) {
            TangentSums found(lanes, reader, row * wo, i);
            for (int64_t ox = 0; ox < wo; ++ox) found.add(ox, load(lanes, yd + ox * q.c));
            found.flush_into(into, q.c);
            continue;
          }
          const float* g = reader.adjoint.row(row * wo) + i;
          V with_g = {};
          for (int64_t ox = 0; ox < wo; ++ox)
            with_g += load(lanes, yd + ox * q.c) * load_ahead(lanes, g + ox * reader.adjoint.stride);
          flush(lanes, into + SUM_YD_G * q.c, with_g);
        }
      });
    }
  });
  const double* totals = over_parts(sums, parts.count, width, of_call);
  for (int64_t k = 0; k < n_readers; ++k) {
    auto of = [&](int64_t reader, int quantity) { return totals + (reader * TANGENT_SUMS + quantity) * q.c; };
    write_tangent_sums(q.readers[k], q.c, of(first_of_pool(k), SUM_YD), of(first_of_pool(k), SUM_YD_H),
                       of(k, SUM_YD_G));
  }
}
