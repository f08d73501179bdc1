// The mix: candidates, batch-normalised on load, weighed and summed into a node; all candidates of a node in
// one pass over memory, a chunk of pixels after the other, so that what they share stays in the first cache.
// And `spread`: what the mixes that read a tensor hand back of it, summed.
#include "lanes.h"

extern "C" {

// Tensors [m, c]. mean null: h is y. Pointers that a function does not use are null.
struct Candidate {
  const float *y, *mean, *r;
  const float* p;        // its weight
  const float* g;        // the node's adjoint, the same of every candidate of a mix
  const float* tangent;  // of y; null: zero
  const float* second;   // the node's second adjoint
  float* adjoint;        // of y, or the second one; null: not wanted
  int64_t batch;         // whether mean and r are those of y, and not constants
};

struct Mix {
  const Candidate* candidates;
  float* out;       // the node, or its tangent; null: only the slice is wanted
  float* slice;     // the same, `row` values from one pixel to the next; null: not wanted
  float* sums;      // [count, c], of g h: `backward` writes them, `tangent` reads them
  float* bends;     // [count, BENDS, c], what `tangent` leaves for `second`
  float* factors;   // [count, 3 in `backward`, 5 in `second`, c]: see Factors
  float* p_gained;  // [count]: the sums of `sums` over channels; of u; or in `second` both
  const float* p_before;  // in `second` what `tangent` wrote there
  int64_t count, m, c, row;
};

// What one mix hands back of a tensor
struct Reader {
  const float* g;        // the node's adjoint, or in the second sweep the second one
  const float* first;    // the first adjoint in the second sweep; else null
  const float* factors;  // of this tensor, [3 or 5, c]
};

struct Shared {  // a tensor
  const float *y, *mean;  // mean null: y is not normalised, nor read
  const float* tangent;   // in the second sweep; null: zero
  float* adjoint;         // the sum
  const Reader* readers;
};

struct Spread {
  const Shared* tensors;
  int64_t count, readers, m, c;
};
}

namespace {

constexpr int64_t CHUNK = 4096;  // floats: 16 KB of the node, 16 KB of its adjoint in the first cache

struct Chunks {
  int64_t pixels, count;
  template <class Call>
  explicit Chunks(const Call& q)
      : pixels(CHUNK / q.c > 0 ? CHUNK / q.c : 1), count((q.m + pixels - 1) / pixels) {}
  int64_t last(int64_t chunk, int64_t m) const { return (chunk + 1) * pixels < m ? (chunk + 1) * pixels : m; }
};

// r and mean of every candidate [count, c]; of one without a batch norm 1 and 0
struct Norms {
  float *mean, *r;
  explicit Norms(const Mix& q) : mean(of_call.zeros(q.count * q.c)), r(of_call.take(q.count * q.c)) {
    for (int64_t k = 0; k < q.count; ++k)
      for (int64_t i = 0; i < q.c; ++i) {
        const Candidate& y = q.candidates[k];
        if (y.mean) mean[k * q.c + i] = y.mean[i];
        r[k * q.c + i] = y.mean ? y.r[i] : 1.f;
      }
  }
};

// Of a thread, a chunk of the node, or of its tangent, while it is summed; copied to the slice from the cache.
class Node {
 public:
  explicit Node(const Mix& q, int64_t first, int64_t last) : q_(q), first_(first), last_(last) {
    of_worker.reset();
    start_ = q.out ? q.out + first * q.c : of_worker.take((last - first) * q.c);
  }
  ~Node() {
    if (q_.slice == nullptr) return;
    for (int64_t j = first_; j < last_; ++j)
      std::memcpy(q_.slice + j * q_.row, at(j), size_t(q_.c) * sizeof(float));
  }
  float* at(int64_t pixel) const { return start_ + (pixel - first_) * q_.c; }

 private:
  const Mix& q_;
  int64_t first_, last_;
  float* start_;
};

// The sums over pixels of g h and of g, [count, 2, c], where g is the member that is given.
const double* adjoint_sums(const Mix& q, const Norms& norms, const float* Candidate::*g_of, int threads) {
  Chunks chunks(q);
  int64_t width = 2 * q.count * q.c;
  float* partial = of_call.take(chunks.count * width);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for_channels(q.c, [&](auto zero, int64_t i) {
      using T = decltype(zero);
      float* into = partial + chunk * width + i;
      T sum = {};
      const float* summed = nullptr;
      for (int64_t k = 0; k < q.count; ++k, into += 2 * q.c) {
        const float *y = q.candidates[k].y + i, *g = q.candidates[k].*g_of + i;
        if (g != summed) {  // once where all have the same
          sum = T{}, summed = g;
          for (int64_t j = first; j < last; ++j) sum += load<T>(g + j * q.c);
        }
        store(into + q.c, sum);
        T mean = load<T>(norms.mean + k * q.c + i), even = {}, odd = {};
        int64_t j = first;
        for (; j + 2 <= last; j += 2) {
          even += load<T>(g + j * q.c) * (load_ahead<T>(y + j * q.c) - mean);
          odd += load<T>(g + (j + 1) * q.c) * (load_ahead<T>(y + (j + 1) * q.c) - mean);
        }
        if (j < last) even += load<T>(g + j * q.c) * (load<T>(y + j * q.c) - mean);
        store(into, (even + odd) * load<T>(norms.r + k * q.c + i));
      }
    });
  }
  return over_parts(partial, chunks.count, width, of_call);
}

// The adjoint of every candidate that wants it, from its factors; SECOND: the second one.
template <bool SECOND>
void write_adjoints(const Mix& q, const Norms& norms, int threads) {
  Chunks chunks(q);
  constexpr int ROWS = SECOND ? FACTORS : FIRST_FACTORS;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for (int64_t k = 0; k < q.count; ++k) {
      const Candidate& candidate = q.candidates[k];
      if (candidate.adjoint == nullptr) continue;
      for_channels(q.c, [&](auto zero, int64_t i) {
        using T = decltype(zero);
        Factors<T> factors(q.factors + k * ROWS * q.c + i, q.c, SECOND, load<T>(norms.mean + k * q.c + i));
        const float* g = (SECOND ? candidate.second : candidate.g) + i;
        for (int64_t j = first * q.c; j < last * q.c; j += q.c) {
          T found = factors.of(load<T>(g + j), load<T>(candidate.y + i + j));
          if (SECOND && candidate.tangent)
            found = factors.and_of(found, load<T>(candidate.g + i + j), load<T>(candidate.tangent + i + j));
          store(candidate.adjoint + i + j, found);
        }
      });
    }
  }
}

}  // namespace

extern "C" void darts_mix_forward(const Mix* call, int threads) {
  const Mix& q = *call;
  of_call.reset();
  Norms norms(q);
  Chunks chunks(q);
  float* scale = of_call.take(q.count * q.c);
  for (int64_t k = 0; k < q.count; ++k)
    for (int64_t i = 0; i < q.c; ++i) scale[k * q.c + i] = *q.candidates[k].p * norms.r[k * q.c + i];
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    Node node(q, first, last);
    for (int64_t k = 0; k < q.count; k += 4) {  // four at a time: a fourth of the loads and stores of the node
      int64_t n = q.count - k < 4 ? q.count - k : 4;
      for_channels(q.c, [&](auto zero, int64_t i) {
        using T = decltype(zero);
        const float* y[4];
        T s[4], mean[4];  // the mean is taken off first: one offset for all would cancel, and lose digits
        for (int64_t l = 0; l < 4; ++l) {  // where fewer are left, the first once more, times nothing
          y[l] = q.candidates[k + (l < n ? l : 0)].y + i;
          s[l] = l < n ? load<T>(scale + (k + l) * q.c + i) : T{};
          mean[l] = l < n ? load<T>(norms.mean + (k + l) * q.c + i) : T{};
        }
        for (int64_t j = first; j < last; ++j) {
          float* out = node.at(j) + i;
          T sum = k == 0 ? T{} : load<T>(out);
          sum += s[0] * (load_ahead<T>(y[0] + j * q.c) - mean[0]);
          if (n > 1) sum += s[1] * (load_ahead<T>(y[1] + j * q.c) - mean[1]);
          if (n > 2) sum += s[2] * (load_ahead<T>(y[2] + j * q.c) - mean[2]);
          if (n > 3) sum += s[3] * (load_ahead<T>(y[3] + j * q.c) - mean[3]);
          store(out, sum);
        }
      });
    }
  }
}

// The adjoint of a candidate is p B(g) = p r (g - mean(g) - h mean(g h)).
extern "C" void darts_mix_backward(const Mix* call, int threads) {
  const Mix& q = *call;
  of_call.reset();
  Norms norms(q);
  const double* totals = adjoint_sums(q, norms, &Candidate::g, threads);
  for (int64_t k = 0; k < q.count; ++k) {
    const Candidate& candidate = q.candidates[k];
    double gained = 0, m = double(q.m);
    for (int64_t i = 0; i < q.c; ++i) {
      double gh = totals[2 * k * q.c + i], g = totals[(2 * k + 1) * q.c + i], r = norms.r[k * q.c + i];
      q.sums[k * q.c + i] = float(gh);
      gained += gh;
      write_factors(q.factors + k * FIRST_FACTORS * q.c + i, q.c, *candidate.p * r, r, g / m, gh / m,
                    candidate.mean && candidate.batch);
    }
    q.p_gained[k] = float(gained);
  }
  write_adjoints<false>(q, norms, threads);
}

// hd = r (yd - mean(yd) - h t), t = mean(h yd); u = mean(g hd); s = mean(g h)
extern "C" void darts_mix_tangent(const Mix* call, int threads) {
  const Mix& q = *call;
  of_call.reset();
  Norms norms(q);
  Chunks chunks(q);
  int64_t width = 4 * q.count * q.c;  // of yd, h yd, g yd and g of every candidate
  float* partial = of_call.zeros(chunks.count * width);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for_channels(q.c, [&](auto zero, int64_t i) {
      using T = decltype(zero);
      float* into = partial + chunk * width + i;
      T sum = {};
      const float* summed = nullptr;
      for (int64_t k = 0; k < q.count; ++k, into += 4 * q.c) {
        const Candidate& candidate = q.candidates[k];
        if (!candidate.tangent) continue;
        const float* g = candidate.g + i;
        if (g != summed) {
          sum = T{}, summed = g;
          for (int64_t j = first; j < last; ++j) sum += load<T>(g + j * q.c);
        }
        T mean = load<T>(norms.mean + k * q.c + i), of_yd = {}, of_h = {}, of_g = {};
        for (int64_t j = first; j < last; ++j) {
          T yd = load_ahead<T>(candidate.tangent + j * q.c + i);
          of_g += yd * load<T>(g + j * q.c);
          of_yd += yd;
          of_h += yd * (load_ahead<T>(candidate.y + j * q.c + i) - mean);
        }
        store(into, of_yd);
        store(into + q.c, of_h * load<T>(norms.r + k * q.c + i));
        store(into + 2 * q.c, of_g);
        store(into + 3 * q.c, sum);
      }
    });
  }
  const double* totals = over_parts(partial, chunks.count, width, of_call);
  std::memset(q.bends, 0, size_t(q.count * BENDS * q.c) * sizeof(float));
  for (int64_t k = 0; k < q.count; ++k) {
    const Candidate& candidate = q.candidates[k];
    double gained = 0, m = double(q.m);
    for (int64_t i = 0; i < q.c && candidate.tangent; ++i) {
      const double* at = totals + 4 * k * q.c + i;
      double yd = at[0] / m, t = at[q.c] / m, u = at[2 * q.c] / m, g = at[3 * q.c] / m;
      bool moves = candidate.mean && candidate.batch;
      double s = moves ? double(q.sums[k * q.c + i]) / m : 0;
      if (moves) u -= g * yd + s * t;
      if (candidate.mean) u *= double(norms.r[k * q.c + i]);
      gained += u * m;
      if (!moves) continue;
      float* into = q.bends + k * BENDS * q.c + i;
      into[MEAN_YD * q.c] = float(yd), into[MEAN_H_YD * q.c] = float(t), into[MEAN_G_H * q.c] = float(s);
      into[MEAN_G_HD * q.c] = float(u), into[MEAN_G * q.c] = float(g);
    }
    q.p_gained[k] = float(gained);
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    Node node(q, first, last);
    std::memset(node.at(first), 0, size_t((last - first) * q.c) * sizeof(float));
    for (int64_t k = 0; k < q.count; ++k) {
      const Candidate& candidate = q.candidates[k];
      if (!candidate.tangent) continue;
      for_channels(q.c, [&](auto zero, int64_t i) {
        using T = decltype(zero);
        const float* bends = q.bends + k * BENDS * q.c + i;
        T r = load<T>(norms.r + k * q.c + i), scale = *candidate.p * r;
        float* out = node.at(first) - first * q.c;
        if (!candidate.mean || !candidate.batch) {
          for (int64_t j = first * q.c + i; j < last * q.c; j += q.c)
            store(out + j, load<T>(out + j) + scale * load<T>(candidate.tangent + j));
          return;
        }
        T mean = load<T>(norms.mean + k * q.c + i), yd_mean = load<T>(bends + MEAN_YD * q.c);
        T rt = load<T>(bends + MEAN_H_YD * q.c) * r;
        for (int64_t j = first * q.c + i; j < last * q.c; j += q.c) {
          T hd = load_ahead<T>(candidate.tangent + j) - yd_mean - (load_ahead<T>(candidate.y + j) - mean) * rt;  // over r
          store(out + j, load<T>(out + j) + scale * hd);
        }
      });
    }
  }
}

// p [ B(gd) - r (t B(g) + s hd + u h) ], with gd the node's second adjoint
extern "C" void darts_mix_second(const Mix* call, int threads) {
  const Mix& q = *call;
  of_call.reset();
  Norms norms(q);
  const double* totals = adjoint_sums(q, norms, &Candidate::second, threads);
  for (int64_t k = 0; k < q.count; ++k) {
    const Candidate& candidate = q.candidates[k];
    double gained = q.p_before[k], m = double(q.m);
    for (int64_t i = 0; i < q.c; ++i) {
      double gdh = totals[2 * k * q.c + i], gd = totals[(2 * k + 1) * q.c + i], r = norms.r[k * q.c + i];
      gained += gdh;
      write_second_factors(q.factors + k * FACTORS * q.c + i, q.c, *candidate.p * r, r, gd / m, gdh / m,
                           q.bends + k * BENDS * q.c + i, candidate.mean && candidate.batch);
    }
    q.p_gained[k] = float(gained);
  }
  write_adjoints<true>(q, norms, threads);
}

// The adjoint of every tensor, or the second one: the sum of what its readers hand back, by their factors.
extern "C" void darts_spread(const Spread* call, int threads) {
  const Spread& q = *call;
  Chunks chunks(q);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for (int64_t t = 0; t < q.count; ++t) {
      const Shared& tensor = q.tensors[t];
      for_channels(q.c, [&](auto zero, int64_t i) {
        using T = decltype(zero);
        auto total = [&](int row) {
          T sum = {};
          for (int64_t j = 0; j < q.readers; ++j) sum += load<T>(tensor.readers[j].factors + row * q.c + i);
          return sum;
        };
        float* out = tensor.adjoint + i;
        if (tensor.mean) {
          T of_y = total(OF_Y), one = total(OF_ONE), mean = load<T>(tensor.mean + i);
          for (int64_t j = first * q.c; j < last * q.c; j += q.c)
            store(out + j, of_y * (load_ahead<T>(tensor.y + i + j) - mean) + one);
        } else {
          for (int64_t j = first * q.c; j < last * q.c; j += q.c) store(out + j, T{});
        }
        if (tensor.mean && tensor.tangent) {
          T of_tangent = total(OF_TANGENT);
          for (int64_t j = first * q.c; j < last * q.c; j += q.c)
            store(out + j, load<T>(out + j) + of_tangent * load_ahead<T>(tensor.tangent + i + j));
        }
        for (int64_t k = 0; k < q.readers; ++k) {
          const Reader& reader = tensor.readers[k];
          T of_g = load<T>(reader.factors + OF_G * q.c + i);
          if (tensor.mean && tensor.tangent) {
            T of_first = load<T>(reader.factors + OF_FIRST * q.c + i);
            for (int64_t j = first * q.c; j < last * q.c; j += q.c)
              store(out + j, load<T>(out + j) + of_g * load_ahead<T>(reader.g + i + j) +
                                 of_first * load_ahead<T>(reader.first + i + j));
          } else {
            for (int64_t j = first * q.c; j < last * q.c; j += q.c)
              store(out + j, load<T>(out + j) + of_g * load_ahead<T>(reader.g + i + j));
          }
        }
      });
    }
  }
}
