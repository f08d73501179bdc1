// The adjoints of tensors that several nodes read, each a sum over its readers; and sums of tensors.
#include "chunks.h"
#include "reader.h"
#include "team.h"

namespace {

template <bool SECOND>
void fan_out(const FanOut& q, Team& team) {
  of_call.reset();
  std::vector<float*> factors;  // of each tensor, [readers, FACTORS, c]
  for (int64_t t = 0; t < q.count; ++t) {
    const Shared& tensor = q.tensors[t];
    factors.push_back(of_call.take(tensor.n_readers * FACTORS * q.c));
    for (int64_t k = 0; k < tensor.n_readers; ++k)
      write_factors(tensor.readers[k], q.c, double(q.m), SECOND, factors[t] + k * FACTORS * q.c, q.c);
  }
  Chunks chunks(q);
  team.each(chunks.count, [&](int64_t chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for (int64_t t = 0; t < q.count; ++t) {
      const Shared& tensor = q.tensors[t];
      const Matrix statistics = tensor.n_readers ? tensor.readers[0].statistics : Matrix{};
      bool normalised = statistics.data != nullptr;
      for_channels(q.c, [&](auto lanes, int64_t i) {
        auto factor = [&](int64_t k, int which) { return load(lanes, factors[t] + (k * FACTORS + which) * q.c + i); };
        auto total = [&](int which) {
          V sum = {};
          for (int64_t k = 0; k < tensor.n_readers; ++k) sum += factor(k, which);
          return sum;
        };
        float* out = tensor.out + i;
        if (normalised && SECOND) {
          const float* tangent = tensor.readers[0].tangent.data + i;
          V of_y = total(OF_Y), one = total(OF_ONE), of_tangent = total(OF_TANGENT);
          V mean = load(lanes, statistics.row(MEAN) + i);
          for (int64_t j = first * q.c; j < last * q.c; j += q.c)
            store(lanes, out + j, of_tangent * load_ahead(lanes, tangent + j) +
                               (of_y * (load_ahead(lanes, tensor.y + i + j) - mean) + one));
        } else if (normalised) {
          V of_y = total(OF_Y), one = total(OF_ONE), mean = load(lanes, statistics.row(MEAN) + i);
          for (int64_t j = first * q.c; j < last * q.c; j += q.c)
            store(lanes, out + j, of_y * (load_ahead(lanes, tensor.y + i + j) - mean) + one);
        } else {
          for (int64_t j = first * q.c; j < last * q.c; j += q.c) store(lanes, out + j, V{});
        }
        for (int64_t k = 0; k < tensor.n_readers; ++k) {
          const Reader& reader = tensor.readers[k];
          const Matrix g = SECOND ? reader.second : reader.adjoint, before = reader.adjoint;
          V of_g = factor(k, OF_G);
          if (!SECOND && by_image(reader.weight)) {
            for_images(true, q.pixels, first, last, [&](int64_t image, int64_t from, int64_t to) {
              V scale = weight_of(reader.weight, image) * of_g;
              for (int64_t j = from; j < to; ++j)
                store(lanes, out + j * q.c, load(lanes, out + j * q.c) + scale * load_ahead(lanes, g.row(j) + i));
            });
            continue;
          }
          if (normalised && SECOND) {
            V of_first = factor(k, OF_FIRST);
            for (int64_t j = first; j < last; ++j)
              store(lanes, out + j * q.c, load(lanes, out + j * q.c) + of_g * load_ahead(lanes, g.row(j) + i) +
                                       of_first * load_ahead(lanes, before.row(j) + i));
          } else {
            for (int64_t j = first; j < last; ++j)
              store(lanes, out + j * q.c, load(lanes, out + j * q.c) + of_g * load_ahead(lanes, g.row(j) + i));
          }
        }
      });
    }
  });
}

}  // namespace

// The adjoint of every tensor: the sum over its readers of gamma B(p G)
extern "C" void darts_fan_out_backward(const void* table, Team& team) {
  fan_out<false>(*static_cast<const FanOut*>(table), team);
}

// The derivative of that along v
extern "C" void darts_fan_out_second(const void* table, Team& team) {
  fan_out<true>(*static_cast<const FanOut*>(table), team);
}

extern "C" void darts_add(const void* table, Team& team) {
  const Sum& q = *static_cast<const Sum*>(table);
  Chunks chunks(q);
  team.each(chunks.count, [&](int64_t chunk) {
    int64_t first = chunk * chunks.pixels, last = chunks.last(chunk, q.m);
    for_channels(q.c, [&](auto lanes, int64_t i) {
      for (int64_t j = first; j < last; ++j) {
        V sum = load_ahead(lanes, q.terms[0].row(j) + i);
        for (int64_t k = 1; k < q.n_terms; ++k) sum += load_ahead(lanes, q.terms[k].row(j) + i);
        store(lanes, q.out + j * q.c + i, sum);
      }
    });
  });
}
