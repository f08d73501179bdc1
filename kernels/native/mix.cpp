// The mix: candidates are normalised on load, weighed and summed into a node. All candidates of a node are read in
// one pass over memory, a chunk of pixels after the other, so that what they share stays in the first cache. A mix of
// one candidate whose weight is 1 is a batch norm.
#include "chunks.h"
#include "reader.h"
#include "team.h"

namespace {

// The mean and r of every candidate, [count, c]; 0 and 1 where it has no batch norm
struct Norms {
  float *mean, *r;
  explicit Norms(const Mix& q) : mean(of_call.zeros(q.count * q.c)), r(of_call.take(q.count * q.c)) {
    for (int64_t k = 0; k < q.count; ++k)
      for (int64_t i = 0; i < q.c; ++i) {
        const Matrix& statistics = q.candidates[k].statistics;
        if (statistics.data) mean[k * q.c + i] = statistics.row(MEAN)[i];
        r[k * q.c + i] = statistics.data ? statistics.row(R)[i] : 1.f;
      }
  }
};

// Whether p is by image: of all candidates or of none
inline bool by_image(const Mix& q) { return by_image(q.candidates[0].weight); }

// A chunk of the node, or of its tangent, which one thread sums: in an output that is no slice of channels, if there
// is one, else in memory of the thread. At the end it is copied into the other outputs, from the cache.
class Node {
 public:
  Node(const Mix& q, int64_t first, int64_t last) : q_(q), first_(first), last_(last) {
    of_worker.reset();
    for (const Matrix* out = q.outs; whole_ == nullptr && out < q.outs + q.n_outs; ++out)
      if (out->stride == q.c) whole_ = out;
    start_ = whole_ ? whole_->row(first) : of_worker.take((last - first) * q.c);
  }
  ~Node() {
    for (const Matrix* out = q_.outs; out < q_.outs + q_.n_outs; ++out)
      for (int64_t j = first_; out != whole_ && j < last_; ++j)
        std::memcpy(out->row(j), at(j), size_t(q_.c) * sizeof(float));
  }
  float* at(int64_t pixel) const { return start_ + (pixel - first_) * q_.c; }

 private:
  const Mix& q_;
  int64_t first_, last_;
  const Matrix* whole_ = nullptr;
  float* start_;
};

// The sum over channels, too, of G hd of a candidate
double sum_of_g_hd(const Mix& q, int64_t k) {
  const Matrix& statistics = q.candidates[k].statistics;
  double total = 0;
  for (int64_t i = 0; i < q.c; ++i) {
    auto of = [&](const Matrix& sums, int quantity) { return double(sums.row(quantity)[k * q.c + i]); };
    if (statistics.data == nullptr) {
      total += double(q.products[k * q.c + i]);
      continue;
    }
    double of_means = of(q.first_sums, SUM_G) * of(q.tangent_sums, SUM_YD) +
                      of(q.first_sums, SUM_G_H) * of(q.tangent_sums, SUM_YD_H);
    total += double(statistics.row(R)[i]) * (of(q.tangent_sums, SUM_YD_G) - of_means / double(q.m));
  }
  return total;
}

// Writes the sums over pixels of g and g u, where g is the call's adjoint, times p where that is by image; and the
// gradient of each weight, which is the sum of g h over channels, too, and in the second backward sweep of G hd.
void adjoint_sums(const Mix& q, Team& team) {
  Norms norms(q);
  Chunks chunks(q);
  int64_t width = 2 * q.count * q.c, row = q.adjoint.stride;
  float* partial = of_call.take(chunks.count * width);
  team.each(chunks.count, [&](int64_t chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for_channels(q.c, [&](auto lanes, int64_t i) {
      const float* g = q.adjoint.data + i;
      float* start = partial + chunk * width + i;
      for (float* into = start; into < start + width; into += q.c) store(lanes, into, V{});
      for_images(by_image(q), q.pixels, first, last, [&](int64_t image, int64_t from, int64_t to) {
        float* into = start;
        V sum = {};
        for (int64_t j = from; j < to; ++j) sum += load(lanes, g + j * row);
        for (int64_t k = 0; k < q.count; ++k, into += 2 * q.c) {
          const float* y = q.candidates[k].y + i;
          V mean = load(lanes, norms.mean + k * q.c + i), even = {}, odd = {};
          int64_t j = from;
          for (; j + 2 <= to; j += 2) {
            even += load(lanes, g + j * row) * (load_ahead(lanes, y + j * q.c) - mean);
            odd += load(lanes, g + (j + 1) * row) * (load_ahead(lanes, y + (j + 1) * q.c) - mean);
          }
          if (j < to) even += load(lanes, g + j * row) * (load(lanes, y + j * q.c) - mean);
          float p = by_image(q) ? weight_of(q.candidates[k].weight, image) : 1.f;
          V with_u = (even + odd) * load(lanes, norms.r + k * q.c + i);
          store(lanes, into + SUM_G * q.c, load(lanes, into + SUM_G * q.c) + p * sum);
          store(lanes, into + SUM_G_H * q.c, load(lanes, into + SUM_G_H * q.c) + p * with_u);
        }
      });
    });
  });
  const double* totals = over_parts(partial, chunks.count, width, of_call);
  for (int64_t k = 0; k < q.count; ++k, totals += 2 * q.c) {
    double gradient = q.first_sums.data ? sum_of_g_hd(q, k) : 0;
    for (int64_t i = 0; i < q.c; ++i) {
      q.sums.row(SUM_G)[k * q.c + i] = float(totals[SUM_G * q.c + i]);
      q.sums.row(SUM_G_H)[k * q.c + i] = float(totals[SUM_G_H * q.c + i]);
      gradient += totals[SUM_G_H * q.c + i];
    }
    if (q.weight_gradient) q.weight_gradient[k] = float(gradient);
  }
}

}  // namespace

// o = sum over k of p h
extern "C" void darts_mix_forward(const void* table, Team& team) {
  const Mix& q = *static_cast<const Mix*>(table);
  of_call.reset();
  Norms norms(q);
  Chunks chunks(q);
  float *scale = of_call.take(q.count * q.c), *shift = of_call.zeros(q.count * q.c);
  for (int64_t k = 0; k < q.count; ++k)
    for (int64_t i = 0; i < q.c; ++i) {
      const Matrix& affine = q.candidates[k].affine;
      scale[k * q.c + i] = affine.data ? norms.r[k * q.c + i] * affine.row(0)[i] : norms.r[k * q.c + i];
      if (affine.data) shift[k * q.c + i] = affine.row(1)[i];
    }
  team.each(chunks.count, [&](int64_t chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    Node node(q, first, last);
    for_images(by_image(q), q.pixels, first, last, [&](int64_t image, int64_t from, int64_t to) {
      for (int64_t k = 0; k < q.count; k += 4) {  // four at a time, for a fourth of the loads and stores of the node
        int64_t n = q.count - k < 4 ? q.count - k : 4;
        for_channels(q.c, [&](auto lanes, int64_t i) {
          const float* y[4];
          // The mean is subtracted first: as a part of `one` it would cancel, and lose digits.
          V s[4], mean[4], one = {};
          for (int64_t l = 0; l < 4; ++l) {  // where fewer are left, the first one again, times 0
            y[l] = q.candidates[k + (l < n ? l : 0)].y + i;
            s[l] = mean[l] = V{};
            if (l >= n) continue;
            float p = weight_of(q.candidates[k + l].weight, image);
            s[l] = p * load(lanes, scale + (k + l) * q.c + i);
            mean[l] = load(lanes, norms.mean + (k + l) * q.c + i);
            one += p * load(lanes, shift + (k + l) * q.c + i);
          }
          for (int64_t j = from; j < to; ++j) {
            float* out = node.at(j) + i;
            V sum = k == 0 ? one : load(lanes, out) + one;
            sum += s[0] * (load_ahead(lanes, y[0] + j * q.c) - mean[0]);
            if (n > 1) sum += s[1] * (load_ahead(lanes, y[1] + j * q.c) - mean[1]);
            if (n > 2) sum += s[2] * (load_ahead(lanes, y[2] + j * q.c) - mean[2]);
            if (n > 3) sum += s[3] * (load_ahead(lanes, y[3] + j * q.c) - mean[3]);
            store(lanes, out, sum);
          }
        });
      }
    });
  });
}

// The sums of G, G h, and dL/dp
extern "C" void darts_mix_backward(const void* table, Team& team) {
  of_call.reset();
  adjoint_sums(*static_cast<const Mix*>(table), team);
}

// The sums of Gd, Gd h, and of Gd h + G hd
extern "C" void darts_mix_second(const void* table, Team& team) { darts_mix_backward(table, team); }

// od = sum over k of p hd, with hd = r (yd - mean(yd) - h t) and t = mean(h yd), or yd without statistics; there the
// sums of yd G, too.
extern "C" void darts_mix_tangent(const void* table, Team& team) {
  const Mix& q = *static_cast<const Mix*>(table);
  of_call.reset();
  Norms norms(q);
  Chunks chunks(q);
  float *yd_mean = of_call.take(q.count * q.c), *rt = of_call.take(q.count * q.c);
  std::vector<float*> products;  // of each candidate without statistics, [chunk][c]
  for (int64_t k = 0; k < q.count; ++k) {
    bool normalised = q.candidates[k].statistics.data != nullptr;
    products.push_back(normalised ? nullptr : of_call.take(chunks.count * q.c));
    for (int64_t j = k * q.c; normalised && j < (k + 1) * q.c; ++j) {
      yd_mean[j] = float(double(q.tangent_sums.row(SUM_YD)[j]) / double(q.m));
      rt[j] = float(double(norms.r[j]) * double(q.tangent_sums.row(SUM_YD_H)[j]) / double(q.m));
    }
  }
  team.each(chunks.count, [&](int64_t chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    Node node(q, first, last);
    std::memset(node.at(first), 0, size_t((last - first) * q.c) * sizeof(float));
    for (int64_t k = 0; k < q.count; ++k) {
      const Candidate& candidate = q.candidates[k];
      for_channels(q.c, [&](auto lanes, int64_t i) {
        V scale = weight_of(candidate.weight, 0) * load(lanes, norms.r + k * q.c + i);
        float* out = node.at(first) - first * q.c;
        if (products[k]) {
          V product = {};
          for (int64_t pixel = first; pixel < last; ++pixel) {
            int64_t j = pixel * q.c + i;
            V yd = load_ahead(lanes, candidate.tangent + j);
            product += yd * load_ahead(lanes, q.adjoint.row(pixel) + i);
            store(lanes, out + j, load(lanes, out + j) + scale * yd);
          }
          store(lanes, products[k] + chunk * q.c + i, product);
          return;
        }
        V mean = load(lanes, norms.mean + k * q.c + i), of_yd = load(lanes, yd_mean + k * q.c + i);
        V of_h = load(lanes, rt + k * q.c + i);
        for (int64_t j = first * q.c + i; j < last * q.c; j += q.c) {
          V yd = load_ahead(lanes, candidate.tangent + j), deviation = load_ahead(lanes, candidate.y + j) - mean;
          V hd = yd - of_yd - deviation * of_h;  // divided by r
          store(lanes, out + j, load(lanes, out + j) + scale * hd);
        }
      });
    }
  });
  for (int64_t k = 0; k < q.count; ++k) {
    if (products[k] == nullptr) continue;
    const double* totals = over_parts(products[k], chunks.count, q.c, of_call);
    for (int64_t i = 0; i < q.c; ++i) q.products[k * q.c + i] = float(totals[i]);
  }
}

extern "C" void darts_norm_forward(const void* table, Team& team) { darts_mix_forward(table, team); }
extern "C" void darts_norm_backward(const void* table, Team& team) { darts_mix_backward(table, team); }
extern "C" void darts_norm_tangent(const void* table, Team& team) { darts_mix_tangent(table, team); }
