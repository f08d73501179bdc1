// The mix: candidates, batch-normalised on load, weighed and summed into a node; all candidates of a node in
// one pass over memory, a chunk of pixels after the other, so that what they share stays in the first cache.
#include "lanes.h"

extern "C" {

// Tensors [m, c]. mean null: h is y. Pointers that a function does not use are null.
struct Candidate {
  const float *y, *mean, *r, *tangent;
  float* adjoint;  // in `tangent`: what the second adjoint gains
  int64_t batch;   // whether mean and r are those of y, and not constants
};

struct Mix {
  const Candidate* candidates;
  const float *p, *g;
  float* out;   // the node, or its tangent
  float* sums;  // [count, c], of g h
  float* p_gained;
  int64_t count, m, c;
};
}

namespace {

constexpr int64_t CHUNK = 4096;  // floats: 16 KB of the node, 16 KB of its adjoint in the first cache

struct Chunks {
  int64_t pixels, count;
  explicit Chunks(const Mix& q)
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

}  // namespace

extern "C" void darts_mix_forward(const Mix* call, int threads) {
  const Mix& q = *call;
  of_call.reset();
  Norms norms(q);
  Chunks chunks(q);
  float* scale = of_call.take(q.count * q.c);
  for (int64_t k = 0; k < q.count; ++k)
    for (int64_t i = 0; i < q.c; ++i) scale[k * q.c + i] = q.p[k] * norms.r[k * q.c + i];
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
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
          float* out = q.out + j * q.c + i;
          T sum = k == 0 ? T{} : load<T>(out);
          sum += s[0] * (load<T>(y[0] + j * q.c) - mean[0]);
          if (n > 1) sum += s[1] * (load<T>(y[1] + j * q.c) - mean[1]);
          if (n > 2) sum += s[2] * (load<T>(y[2] + j * q.c) - mean[2]);
          if (n > 3) sum += s[3] * (load<T>(y[3] + j * q.c) - mean[3]);
          store(out, sum);
        }
      });
    }
  }
}

extern "C" void darts_mix_backward(const Mix* call, int threads) {
  const Mix& q = *call;
  of_call.reset();
  Norms norms(q);
  Chunks chunks(q);
  int64_t width = (q.count + 1) * q.c;  // of g h of every candidate, then of g
  float* partial = of_call.take(chunks.count * width);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for_channels(q.c, [&](auto zero, int64_t i) {
      using T = decltype(zero);
      float* into = partial + chunk * width + i;
      T sum = {};
      for (int64_t j = first; j < last; ++j) sum += load<T>(q.g + j * q.c + i);
      store(into + q.count * q.c, sum);
      for (int64_t k = 0; k < q.count; ++k) {
        const float* y = q.candidates[k].y + i;
        T mean = load<T>(norms.mean + k * q.c + i), even = {}, odd = {};
        int64_t j = first;
        for (; j + 2 <= last; j += 2) {
          even += load<T>(q.g + j * q.c + i) * (load<T>(y + j * q.c) - mean);
          odd += load<T>(q.g + (j + 1) * q.c + i) * (load<T>(y + (j + 1) * q.c) - mean);
        }
        if (j < last) even += load<T>(q.g + j * q.c + i) * (load<T>(y + j * q.c) - mean);
        store(into + k * q.c, (even + odd) * load<T>(norms.r + k * q.c + i));
      }
    });
  }
  const double* totals = over_parts(partial, chunks.count, width, of_call);
  float* g_mean = of_call.take(q.c);
  float* gh_mean = of_call.take(q.count * q.c);
  for (int64_t i = 0; i < q.c; ++i) {
    g_mean[i] = float(totals[q.count * q.c + i] / double(q.m));
    for (int64_t k = 0; k < q.count; ++k) {
      double sum = totals[k * q.c + i];
      q.sums[k * q.c + i] = float(sum);
      gh_mean[k * q.c + i] = float(sum / double(q.m));
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for (int64_t k = 0; k < q.count; ++k) {
      const Candidate& candidate = q.candidates[k];
      for_channels(q.c, [&](auto zero, int64_t i) {
        using T = decltype(zero);
        T mean = load<T>(norms.mean + k * q.c + i), r = load<T>(norms.r + k * q.c + i), scale = q.p[k] * r;
        if (!candidate.mean || !candidate.batch) {
          for (int64_t j = first; j < last; ++j)
            store(candidate.adjoint + j * q.c + i, scale * load<T>(q.g + j * q.c + i));
          return;
        }
        T of_g = load<T>(g_mean + i), of_h = load<T>(gh_mean + k * q.c + i) * r;
        for (int64_t j = first; j < last; ++j) {
          T g = load<T>(q.g + j * q.c + i) - of_g, h = load<T>(candidate.y + j * q.c + i) - mean;
          store(candidate.adjoint + j * q.c + i, scale * (g - h * of_h));
        }
      });
    }
  }
}

// hd = r (yd - mean(yd) - h t), t = mean(h yd); u = mean(g hd); s = mean(g h)
// gained = - p r (t B(g) + s hd + u h)
extern "C" void darts_mix_tangent(const Mix* call, int threads) {
  const Mix& q = *call;
  of_call.reset();
  Norms norms(q);
  Chunks chunks(q);
  int64_t width = (3 * q.count + 1) * q.c;  // of yd, h yd, g yd of every candidate, then of g
  float* partial = of_call.zeros(chunks.count * width);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for_channels(q.c, [&](auto zero, int64_t i) {
      using T = decltype(zero);
      float* into = partial + chunk * width + i;
      T sum = {};
      for (int64_t j = first; j < last; ++j) sum += load<T>(q.g + j * q.c + i);
      store(into + 3 * q.count * q.c, sum);
      for (int64_t k = 0; k < q.count; ++k) {
        const Candidate& candidate = q.candidates[k];
        if (!candidate.tangent) continue;
        T mean = load<T>(norms.mean + k * q.c + i), of_yd = {}, of_h = {}, of_g = {};
        for (int64_t j = first; j < last; ++j) {
          T yd = load<T>(candidate.tangent + j * q.c + i);
          of_g += yd * load<T>(q.g + j * q.c + i);
          of_yd += yd;
          of_h += yd * (load<T>(candidate.y + j * q.c + i) - mean);
        }
        store(into + 3 * k * q.c, of_yd);
        store(into + (3 * k + 1) * q.c, of_h * load<T>(norms.r + k * q.c + i));
        store(into + (3 * k + 2) * q.c, of_g);
      }
    });
  }
  const double* totals = over_parts(partial, chunks.count, width, of_call);
  enum { YD, T_, S, U, QUANTITIES };  // means of yd, h yd, g h, g hd
  float* means = of_call.zeros(q.count * QUANTITIES * q.c);
  float* g_means = of_call.take(q.c);
  for (int64_t k = 0; k < q.count; ++k) q.p_gained[k] = 0.f;
  for (int64_t k = 0; k < q.count; ++k) {
    const Candidate& candidate = q.candidates[k];
    double gained = 0, m = double(q.m);
    for (int64_t i = 0; i < q.c; ++i) {
      double g_mean = totals[3 * q.count * q.c + i] / m;
      g_means[i] = float(g_mean);
      if (!candidate.tangent) continue;
      double yd = totals[3 * k * q.c + i] / m;
      double t = totals[(3 * k + 1) * q.c + i] / m;
      double u = totals[(3 * k + 2) * q.c + i] / m;
      float* into = means + k * QUANTITIES * q.c + i;
      if (candidate.mean) {
        double s = double(q.sums[k * q.c + i]) / m;
        if (candidate.batch) u -= g_mean * yd + s * t;
        u *= double(norms.r[k * q.c + i]);
        if (candidate.batch)
          into[YD * q.c] = float(yd), into[T_ * q.c] = float(t), into[S * q.c] = float(s), into[U * q.c] = float(u);
      }
      gained += u * m;
    }
    q.p_gained[k] = float(gained);
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    std::memset(q.out + first * q.c, 0, size_t((last - first) * q.c) * sizeof(float));
    for (int64_t k = 0; k < q.count; ++k) {
      const Candidate& candidate = q.candidates[k];
      if (!candidate.tangent) continue;
      for_channels(q.c, [&](auto zero, int64_t i) {
        using T = decltype(zero);
        auto mean_of = [&](int quantity) { return load<T>(means + (k * QUANTITIES + quantity) * q.c + i); };
        T r = load<T>(norms.r + k * q.c + i), scale = q.p[k] * r, mean = load<T>(norms.mean + k * q.c + i);
        if (!candidate.adjoint) {  // no batch norm, or one with constants
          for (int64_t j = first * q.c + i; j < last * q.c; j += q.c)
            store(q.out + j, load<T>(q.out + j) + scale * load<T>(candidate.tangent + j));
          return;
        }
        T yd_mean = mean_of(YD), t = mean_of(T_), s = mean_of(S), u = mean_of(U), g_mean = load<T>(g_means + i);
        for (int64_t j = first * q.c + i; j < last * q.c; j += q.c) {
          T h = (load<T>(candidate.y + j) - mean) * r;
          T hd = load<T>(candidate.tangent + j) - yd_mean - h * t;  // over r
          store(q.out + j, load<T>(q.out + j) + scale * hd);
          T b = load<T>(q.g + j) - g_mean - h * s;  // B(g) over r
          store(candidate.adjoint + j, -scale * (r * (t * b + s * hd) + u * h));
        }
      });
    }
  }
}
