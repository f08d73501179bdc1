// Halves of separable convolutions: [batch norm] -> ReLU -> depthwise -> pointwise, and their four sweeps.
//
// A part of the work is some images of one source. Its relu(h) is written once, padded with zeros, as
// [block of LANES channels][row][column][lane], and stays in the second-level cache (83 KB at 32x32, 16
// channels) while every task that reads the source walks over it, by the four loops of loops.h.
#include "half.h"
#include "loops.h"
#include "reader.h"
#include "team.h"

namespace {

// A call whose sources and outputs have as many floats writes past the caches: of these 4 MB the second cache would
// keep little.
constexpr int64_t STREAMED = 1 << 20;

// The adjoint Y = gamma B(p G) of a task's output, and its derivative Yd along v, in lanes
class Adjoint {
 public:
  Adjoint() = default;
  Adjoint(const Half& half, bool second, Arena& memory) : k_(half.k), reader_(half.task.reader) {
    plain_ = reader_.statistics.data == nullptr && reader_.weight.data == nullptr;
    pixels_ = half.ho * half.wo;
    if (plain_) return;
    int64_t m = half.n * pixels_;
    row_ = half.kb * LANES;
    mean_ = memory.zeros(row_);
    if (reader_.statistics.data)
      std::memcpy(mean_, reader_.statistics.row(MEAN), size_t(half.k) * sizeof(float));
    first_ = memory.zeros(FACTORS * row_);
    write_factors(reader_, half.k, double(m), false, first_, row_);
    if (!second) return;
    second_ = memory.zeros(FACTORS * row_);
    write_factors(reader_, half.k, double(m), true, second_, row_);
  }

  // Y, or Yd, of n pixels of one image from number `pixel` on, in lanes: in `scratch`, or in G itself, where
  // that is Y.
  const float* lanes(int64_t pixel, int64_t n, bool second, float* scratch, ptrdiff_t block) const {
    const Matrix& g = second ? reader_.second : reader_.adjoint;
    if (plain_) return in_lanes(g.row(pixel), n, k_, g.stride, scratch, block);
    float p = weight_of(reader_.weight, pixel / pixels_);
    for_channels(k_, [&](auto lanes, int64_t i) {
      float* into = scratch + i / LANES * block;
      if (reader_.statistics.data == nullptr)
        for (int64_t j = 0; j < n; ++j) store(into + j * LANES, p * load(lanes, g.row(pixel + j) + i));
      else if (second)
        write<true>(lanes, g, pixel, n, i, 1.f, into);
      else
        write<false>(lanes, g, pixel, n, i, by_image(reader_.weight) ? p : 1.f, into);
    });
    return scratch;
  }

 private:
  template <bool SECOND, class Lanes>
  void write(Lanes lanes, const Matrix& of_g, int64_t pixel, int64_t n, int64_t i, float p, float* into) const {
    Factors factors((SECOND ? second_ : first_) + i, row_, load(mean_ + i));
    factors.g *= p;
    const float *g = of_g.row(pixel) + i, *y = reader_.y.row(pixel) + i;
    const float *first = nullptr, *yd = nullptr;
    if (SECOND) first = reader_.adjoint.row(pixel) + i, yd = reader_.tangent.row(pixel) + i;
    int64_t g_stride = of_g.stride, y_stride = reader_.y.stride, first_stride = reader_.adjoint.stride;
    for (int64_t j = 0; j < n; ++j, g += g_stride, y += y_stride) {
      V of_pixel = load_ahead(lanes, g), of_y = load_ahead(lanes, y), of_first = {}, of_yd = {};
      if (SECOND) {
        of_first = load_ahead(lanes, first), of_yd = load_ahead(lanes, yd);
        first += first_stride, yd += y_stride;
      }
      store(into + j * LANES, SECOND ? factors.of(of_pixel, of_y, of_first, of_yd) : factors.of(of_pixel, of_y));
    }
  }

  int64_t k_ = 0, pixels_ = 0;  // of an image
  Reader reader_ = {};
  bool plain_ = true;
  int64_t row_ = 0;
  float *mean_ = nullptr, *first_ = nullptr, *second_ = nullptr;
};

// The batch norm of a source, for its channels, padded to whole blocks
struct Norm {
  bool present = false;
  float *mean = nullptr, *r = nullptr;       // u = (x - mean) r
  float *scale = nullptr, *shift = nullptr;  // h = (x - mean) scale + shift, with gamma and beta
  float *xd_mean = nullptr, *t = nullptr;    // hd = r (xd - mean(xd) - h mean(h xd))

  explicit Norm(const Source& s) : present(s.statistics.data != nullptr) {
    if (!present) return;
    int64_t padded = blocks_of(s.c) * LANES;
    mean = of_call.zeros(padded), r = of_call.zeros(padded);
    xd_mean = of_call.zeros(padded), t = of_call.zeros(padded);
    std::memcpy(mean, s.statistics.row(MEAN), size_t(s.c) * sizeof(float));
    std::memcpy(r, s.statistics.row(R), size_t(s.c) * sizeof(float));
    scale = r, shift = of_call.zeros(padded);
    if (s.affine.data) {
      scale = of_call.zeros(padded);
      for (int64_t i = 0; i < s.c; ++i) scale[i] = r[i] * s.affine.row(0)[i], shift[i] = s.affine.row(1)[i];
    }
    for (int64_t i = 0; s.tangent && i < s.c; ++i) {
      double m = double(s.n * s.h * s.w);
      xd_mean[i] = float(double(s.tangent_sums.row(SUM_YD)[i]) / m);
      t[i] = float(double(s.tangent_sums.row(SUM_YD_H)[i]) / m);
    }
  }
};

// One row of relu(h) of a block of channels, and of its tangent; with a tangent the scale is r, and the shift 0.
template <bool NORM, bool TANGENT, class Lanes>
INLINE void rectify_row(Lanes lanes, const float* x, const float* xd, int64_t n, int64_t c, V mean, V scale, V shift,
                        V xd_mean, V t, float* out, float* tangent) {
  for (int64_t j = 0; j < n; ++j) {
    V h = load_ahead(lanes, x + j * c);
    if (NORM) h = (h - mean) * scale + shift;
    V rectified = relu(h);
    store(out + j * LANES, rectified);
    if (TANGENT) {
      V hd = load_ahead(lanes, xd + j * c);
      if (NORM) hd = scale * (hd - xd_mean - h * t);
      store(tangent + j * LANES, masked(hd, rectified));
    }
  }
}

// relu(h) of one image, padded; with TANGENT, its tangent behind it.
template <bool TANGENT>
void rectify(const Source& s, const Norm& norm, const Padded& in, int64_t image, float* a) {
  const float* x = s.x + image * s.h * s.w * s.c;
  const float* xd = TANGENT ? s.tangent + image * s.h * s.w * s.c : nullptr;
  in.clear_border(a);
  if (TANGENT) in.clear_border(a + in.image);
  for_channels(s.c, [&](auto lanes, int64_t i) {
    V mean = {}, scale = {}, shift = {}, xd_mean = {}, t = {};
    if (norm.present) {
      mean = load(norm.mean + i), scale = load(norm.scale + i), shift = load(norm.shift + i);
      xd_mean = load(norm.xd_mean + i), t = load(norm.t + i);
    }
    for (int64_t y = 0; y < s.h; ++y) {
      float* out = a + i / LANES * in.block + in.at(y, 0);
      ptrdiff_t at = y * s.w * s.c + i;
      const float* row_of_xd = TANGENT ? xd + at : nullptr;
      if (norm.present)
        rectify_row<true, TANGENT>(lanes, x + at, row_of_xd, s.w, s.c, mean, scale, shift, xd_mean, t, out,
                                   out + in.image);
      else
        rectify_row<false, TANGENT>(lanes, x + at, row_of_xd, s.w, s.c, mean, scale, shift, xd_mean, t, out,
                                    out + in.image);
    }
  });
}

// The tasks of a call, by source
struct Call {
  Arena& memory;  // of the thread that called; all threads take from it, and read what is there
  const Source* sources;
  std::vector<Padded> inputs;
  std::vector<Half> halves;
  std::vector<Norm> norms;
  std::vector<std::vector<int>> tasks;  // those of each source
  std::vector<Parts> parts;
  std::vector<std::pair<int, int64_t>> units;  // sources and their parts, which are computed in parallel
  bool streamed;                               // results are written past the caches

  explicit Call(const SepConv& call) : memory(of_call), sources(call.sources), tasks(call.n_sources) {
    memory.reset();
    for (int64_t t = 0; t < call.n_tasks; ++t) tasks[call.tasks[t].source].push_back(int(t));
    int64_t floats = 0;
    for (int64_t s = 0; s < call.n_sources; ++s) {
      const Source& source = sources[s];
      int64_t pad = 0;
      for (int t : tasks[s])
        if (Half::reach(call.tasks[t]) > pad) pad = Half::reach(call.tasks[t]);
      inputs.emplace_back(source.c, source.h, source.w, pad);
      norms.emplace_back(source);
      parts.emplace_back(source.n);
      for (int64_t part = 0; part < parts[s].count; ++part) units.emplace_back(int(s), part);
      floats += source.n * source.h * source.w * source.c;
    }
    for (int64_t t = 0; t < call.n_tasks; ++t) {
      const Task& task = call.tasks[t];
      halves.emplace_back(task, sources[task.source], inputs[task.source]);
      floats += halves[t].n * halves[t].ho * halves[t].wo * halves[t].k;
    }
    streamed = floats >= STREAMED;
  }

  const Parts& parts_of(int64_t task) const { return parts[halves[task].task.source]; }

  // The most pixels that a depthwise convolution of a source computes before the pointwise one reads them
  int64_t most_pixels(int s) const { return GROUP > inputs[s].w ? GROUP : inputs[s].w; }

  // The largest padded adjoint of a depthwise output, and the most blocks of an output, of a source's tasks
  std::pair<ptrdiff_t, int> largest(int s) const {
    std::pair<ptrdiff_t, int> found = {0, 0};
    for (int t : tasks[s]) {
      if (halves[t].z.image > found.first) found.first = halves[t].z.image;
      if (halves[t].kb > found.second) found.second = halves[t].kb;
    }
    return found;
  }
};

// Calls body(half, number) for every task, before or behind the units.
template <class Body>
void for_tasks(const Call& call, Team& team, const Body& body) {
  team.each(int64_t(call.halves.size()), [&](int64_t t) {
    of_worker.reset();
    body(call.halves[t], t);
  });
}

// Calls body(source, part, first image, behind the last image) for every unit.
template <class Body>
void for_units(const Call& call, Team& team, const Body& body) {
  team.each(int64_t(call.units.size()), [&](int64_t u) {
    of_worker.reset();
    auto [s, part] = call.units[u];
    int64_t size = call.parts[s].size, first = part * size, n = call.sources[s].n;
    body(s, part, first, first + size < n ? first + size : n);
    end_of_streams();
  });
}

// Calls body(first row, rows, pixels before the first) for every group of rows of one image of a task's output.
template <class Body>
INLINE void for_groups(const Half& half, int64_t image, const Body& body) {
  for (int64_t y = 0; y < half.ho; y += half.group) {
    int64_t rows = y + half.group < half.ho ? half.group : half.ho - y;
    body(y, rows, (image * half.ho + y) * half.wo);
  }
}

// The sums of H, H h of every source, in double: [source][part][quantity][channel]
struct AdjointSums {
  const Call& call;
  std::vector<double*> of_source;
  std::vector<int64_t> width;

  explicit AdjointSums(const Call& call) : call(call) {
    for (size_t s = 0; s < call.inputs.size(); ++s) {
      width.push_back(call.inputs[s].blocks * LANES);
      of_source.push_back(of_call.zeros<double>(call.parts[s].count * 2 * width[s]));
    }
  }
  double* at(int s, int64_t part, int quantity) const { return of_source[s] + (part * 2 + quantity) * width[s]; }
  // Writes those of every source: those of its parts, added.
  void write() const {
    for (size_t s = 0; s < of_source.size(); ++s) {
      const Source& source = call.sources[s];
      if (source.sums.data == nullptr) continue;
      const double* totals = over_parts(of_source[s], call.parts[s].count, 2 * width[s], of_call);
      for (int quantity : {SUM_G, SUM_G_H})
        for (int64_t i = 0; i < source.c; ++i) source.sums.row(quantity)[i] = float(totals[quantity * width[s] + i]);
    }
  }
};

// Z (+)= P' Y of `rows` rows from row y on, in the padded z.
void adjoint_rows(const Half& half, const float* weights, const float* y_lanes, ptrdiff_t y_block, int64_t y,
                  int64_t rows, float* z, bool add = false) {
  Inputs inputs(y_block, half.kb, half.k);
  for (int b = 0; b < half.cb; b += 2) {
    const float* of_blocks = weights + b * half.kb * LANES * LANES;
    for (int64_t r = 0; r < rows; ++r) {
      const float* in = y_lanes + r * half.wo * LANES;
      float* out = z + b * half.z.block + half.z.at(y + r, 0);
      if (b + 1 < half.cb)
        pointwise<2>(in, inputs, of_blocks, out, half.z.block, half.wo, add);
      else
        pointwise<1>(in, inputs, of_blocks, out, half.z.block, half.wo, add);
    }
  }
}

// One image of the source's adjoint, H = [a > 0] g with g [blocks][h][w][LANES], to which its terms are added; and,
// where they are wanted, the sums of H and of H u. Without gamma and beta u is h, and as a = relu(h), H h is H a.
void mask_image(const Source& s, const Norm& norm, const Padded& in, const float* g, const float* a, int64_t image,
                bool streamed, double* sums, double* sums_with_u) {
  float* out = s.adjoint + image * s.h * s.w * s.c;
  const float* x = s.x + image * s.h * s.w * s.c;
  bool past = streamed && s.c % LANES == 0 && aligned(out);
  for_channels(s.c, [&](auto lanes, int64_t i) {
    int64_t b = i / LANES;
    V mean = {}, r = {};
    if (s.affine.data) mean = load(norm.mean + i), r = load(norm.r + i);
    for (int64_t y = 0; y < s.h; ++y) {
      const float* ga = g + (b * s.h + y) * s.w * LANES;
      const float* aa = a + b * in.block + in.at(y, 0);
      V total = {}, with_u = {};
      for (int64_t j = 0; j < s.w; ++j) {
        V rectified = load(aa + j * LANES), found = masked(load(ga + j * LANES), rectified);
        total += found;
        int64_t place = (y * s.w + j) * s.c + i;
        with_u += found * (s.affine.data ? (load(lanes, x + place) - mean) * r : rectified);
        for (const Matrix* term = s.terms; term < s.terms + s.n_terms; ++term)
          found += load_ahead(lanes, term->row(image * s.h * s.w + y * s.w + j) + i);
        float* at = out + place;
        past ? stream(at, found) : store(lanes, at, found);
      }
      if (s.sums.data) flush(lanes, sums + i, total), flush(lanes, sums_with_u + i, with_u);
    }
  });
}

}  // namespace

// y of every task, and its statistics
extern "C" void darts_sepconv_forward(const void* table, Team& team) {
  Call call(*static_cast<const SepConv*>(table));
  struct Prepared {
    Stencil stencil;
    const float* p;
    double* sums;  // [part][shift, sum, squares][k]
  };
  std::vector<Prepared> prepared(call.halves.size());
  for_tasks(call, team, [&](const Half& half, int64_t t) {
    prepared[t] = {forward_stencil(half, {{true, half.task.d, 0}}, call.memory),
                   packed(half.task.p, half.k, half.c, false, call.memory),
                   call.memory.zeros<double>(call.parts_of(t).count * 3 * half.kb * LANES)};
  });
  for_units(call, team, [&](int s, int64_t part, int64_t first, int64_t last) {
    const Padded& in = call.inputs[s];
    float* a = of_worker.take(in.image);
    float* z = of_worker.take(in.blocks * LANES * call.most_pixels(s));
    for (int64_t image = first; image < last; ++image) {
      rectify<false>(call.sources[s], call.norms[s], in, image, a);
      for (int t : call.tasks[s]) {
        const Half& half = call.halves[t];
        const Matrix& out = half.task.y;
        int64_t width = half.kb * LANES;
        const Prepared& of_task = prepared[t];
        double* of_part = of_task.sums + part * 3 * width;
        for_groups(half, image, [&](int64_t y, int64_t rows, int64_t pixel) {
          ptrdiff_t block = rows * half.wo * LANES;
          depthwise(half, of_task.stencil, a, y, rows, z, block);
          Inputs inputs(block, half.cb, half.c);
          for_blocks(half.k, [&](auto blocks, auto lanes, int64_t i) {
            constexpr int B = blocks();
            const float* weights = of_task.p + i * half.cb * LANES;
            double* at = of_part + i;
            if (image == first && y == 0) {  // the shift: the part's first pixel
              V value[B][1];
              pointwise_tile<1, B>(z, inputs, weights, value);
              for (int b = 0; b < B; ++b) flush(All{}, at + b * LANES, value[b][0]);
            }
            Sums found[B] = {};
            for (int b = 0; b < B; ++b) found[b].shift = narrow(All{}, at + b * LANES);
            pointwise_out<B>(z, inputs, weights, out.row(pixel) + i, out.stride, lanes, rows * half.wo, call.streamed,
                             found);
            for (int b = 0; b < B; ++b, at += LANES) {
              flush(All{}, at + width, found[b].sum);
              flush(All{}, at + 2 * width, found[b].squares);
            }
          });
        });
      }
    }
  });
  for_tasks(call, team, [&](const Half& half, int64_t t) {
    const Parts& parts = call.parts_of(t);
    const Matrix& statistics = half.task.statistics;
    int64_t width = half.kb * LANES;
    for (int64_t i = 0; statistics.data && i < half.k; ++i) {
      Moments moments;
      for (int64_t part = 0; part < parts.count; ++part) {
        int64_t images = part + 1 < parts.count ? parts.size : half.n - part * parts.size;
        const double* at = prepared[t].sums + part * 3 * width + i;
        moments.merge(double(images * half.ho * half.wo), at[0], at[width], at[2 * width]);
      }
      statistics.row(MEAN)[i] = float(moments.mean);
      statistics.row(VARIANCE)[i] = moments.variance();
      statistics.row(R)[i] = moments.r();
    }
  });
}

// The adjoint H of every source, its sums, and the gradients of the weights where they are wanted.
extern "C" void darts_sepconv_backward(const void* table, Team& team) {
  Call call(*static_cast<const SepConv*>(table));
  struct Prepared {
    Stencil forward;
    std::vector<Stencil> backward;
    const float* p;
    Adjoint adjoint;
    float *p_sums, *d_sums;  // [part][kb][cb][c lanes][k lanes] and [part][cb][tap][lanes]
  };
  std::vector<Prepared> prepared(call.halves.size());
  for_tasks(call, team, [&](const Half& half, int64_t t) {
    int64_t parts = half.task.p_gradient ? call.parts_of(t).count : 0;
    prepared[t] = {forward_stencil(half, {{true, half.task.d, 0}}, call.memory),
                   adjoint_stencils(half, {{true, half.task.d, 0}}, call.memory),
                   packed(half.task.p, half.k, half.c, true, call.memory),
                   Adjoint(half, false, call.memory),
                   call.memory.zeros(parts * half.kb * half.cb * LANES * LANES),
                   call.memory.zeros(parts * half.cb * half.side() * half.side() * LANES)};
  });
  AdjointSums sums(call);
  for_units(call, team, [&](int s, int64_t part, int64_t first, int64_t last) {
    const Source& source = call.sources[s];
    const Padded& in = call.inputs[s];
    auto [z_most, kb_most] = call.largest(s);
    float* a = of_worker.take(in.image);
    float* g = of_worker.zeros(in.blocks * in.h * in.w * LANES);
    float* z_adjoint = of_worker.take(z_most);
    float* z = of_worker.take(in.blocks * LANES * call.most_pixels(s));
    float* scratch = of_worker.take(kb_most * LANES * call.most_pixels(s));
    for (int64_t image = first; image < last; ++image) {
      rectify<false>(source, call.norms[s], in, image, a);
      bool add = false;
      for (int t : call.tasks[s]) {
        const Half& half = call.halves[t];
        const Prepared& of_task = prepared[t];
        int64_t taps = half.side() * half.side();
        half.z.clear_border(z_adjoint);
        for_groups(half, image, [&](int64_t y, int64_t rows, int64_t pixel) {
          int64_t pixels = rows * half.wo;
          ptrdiff_t block = pixels * LANES;
          const float* lanes = of_task.adjoint.lanes(pixel, pixels, false, scratch, block);
          adjoint_rows(half, of_task.p, lanes, block, y, rows, z_adjoint);
          if (half.task.p_gradient == nullptr) return;
          depthwise(half, of_task.forward, a, y, rows, z, block);
          float* into = of_task.p_sums + part * half.kb * half.cb * LANES * LANES;
          for (int k = 0; k < half.kb; ++k)
            for (int c = 0; c < half.cb; ++c, into += LANES * LANES)
              outer(lanes + k * block, z + c * block, pixels, half.c - c * LANES, into);
          if (half.task.d_gradient == nullptr) return;
          for (int c = 0; c < half.cb; ++c)
            correlate(half.task, z_adjoint + c * half.z.block + half.z.at(y, 0), half.z.row,
                      a + c * in.block + in.at(y * half.task.stride, 0) + half.shift(0) * (in.row + LANES),
                      in.row, rows, half.wo, of_task.d_sums + (part * half.cb + c) * taps * LANES);
        });
        adjoint(half, of_task.backward, z_adjoint, g, add);
        add = true;
      }
      mask_image(source, call.norms[s], in, g, a, image, call.streamed, sums.at(s, part, SUM_G),
                 sums.at(s, part, SUM_G_H));
    }
  });
  sums.write();
  for_tasks(call, team, [&](const Half& half, int64_t t) {
    if (half.task.p_gradient == nullptr) return;
    int64_t parts = call.parts_of(t).count, taps = half.side() * half.side();
    const double* p_total = over_parts(prepared[t].p_sums, parts, half.kb * half.cb * LANES * LANES, of_worker);
    for (int64_t o = 0; o < half.k; ++o) {
      const double* from = p_total + o / LANES * half.cb * LANES * LANES + o % LANES;  // a row of LANES a channel
      for (int64_t i = 0; i < half.c; ++i) half.task.p_gradient[o * half.c + i] = float(from[i * LANES]);
    }
    if (half.task.d_gradient == nullptr) return;
    const double* d_total = over_parts(prepared[t].d_sums, parts, half.cb * taps * LANES, of_worker);
    for (int64_t i = 0; i < half.c; ++i)
      for (int64_t tap = 0; tap < taps; ++tap)
        half.task.d_gradient[i * taps + tap] = float(d_total[(i / LANES * taps + tap) * LANES + i % LANES]);
  });
}

// yd of every task, and its sums
extern "C" void darts_sepconv_tangent(const void* table, Team& team) {
  Call call(*static_cast<const SepConv*>(table));
  struct Prepared {
    Stencil z, zd;      // D * a, and Dd * a + D * ad
    const float* both;  // [Pd P]: yd = Pd z + P zd
    double* sums;       // [part][TANGENT_SUMS][k]
  };
  std::vector<Prepared> prepared(call.halves.size());
  for_tasks(call, team, [&](const Half& half, int64_t t) {
    const Task& task = half.task;
    ptrdiff_t inputs = half.cb * LANES * LANES;
    float* both = call.memory.zeros(2 * half.kb * inputs);
    pack(task.p_tangent, half.k, half.c, false, both, 2 * inputs);
    pack(task.p, half.k, half.c, false, both + inputs, 2 * inputs);
    std::vector<Operand> of_zd = {{task.d != nullptr, task.d_tangent, 0}, {true, task.d, half.in.image}};
    prepared[t] = {forward_stencil(half, {{true, task.d, 0}}, call.memory),
                   forward_stencil(half, of_zd, call.memory), both,
                   call.memory.zeros<double>(call.parts_of(t).count * TANGENT_SUMS * half.kb * LANES)};
  });
  for_units(call, team, [&](int s, int64_t part, int64_t first, int64_t last) {
    const Padded& in = call.inputs[s];
    float* a = of_worker.take(2 * in.image);
    float* z = of_worker.take(2 * in.blocks * LANES * call.most_pixels(s));
    for (int64_t image = first; image < last; ++image) {
      rectify<true>(call.sources[s], call.norms[s], in, image, a);
      for (int t : call.tasks[s]) {
        const Half& half = call.halves[t];
        const Prepared& of_task = prepared[t];
        const Matrix& out = half.task.y;
        int64_t width = half.kb * LANES;
        double* of_part = of_task.sums + part * TANGENT_SUMS * width;
        for_groups(half, image, [&](int64_t y, int64_t rows, int64_t pixel) {
          ptrdiff_t block = rows * half.wo * LANES;
          depthwise(half, of_task.z, a, y, rows, z, block);
          depthwise(half, of_task.zd, a, y, rows, z + half.cb * block, block);
          Inputs inputs(block, 2 * half.cb, half.c);
          for_channels(half.k, [&](auto lanes, int64_t i) {
            TangentSums<decltype(lanes)> found[1] = {{lanes, half.task.reader, pixel, i}};
            pointwise_out<1>(z, inputs, of_task.both + i * 2 * half.cb * LANES, out.row(pixel) + i, out.stride, lanes,
                             rows * half.wo, call.streamed, found);
            found[0].flush_into(of_part + i, width);
          });
        });
      }
    }
  });
  for_tasks(call, team, [&](const Half& half, int64_t t) {
    int64_t parts = call.parts_of(t).count, width = half.kb * LANES;
    const double* totals = over_parts(prepared[t].sums, parts, TANGENT_SUMS * width, of_worker);
    write_tangent_sums(half.task.reader, half.k, totals + SUM_YD * width, totals + SUM_YD_H * width,
                       totals + SUM_YD_G * width);
  });
}

// The second adjoint Hd of every source, and its sums.
extern "C" void darts_sepconv_second(const void* table, Team& team) {
  Call call(*static_cast<const SepConv*>(table));
  struct Prepared {
    std::vector<Stencil> stencils;  // Dd' * Z + D' * Zd
    const float *p, *pd;            // transposed: Z = P' Y, Zd = P' Yd + Pd' Y
    Adjoint adjoint;
  };
  std::vector<Prepared> prepared(call.halves.size());
  for_tasks(call, team, [&](const Half& half, int64_t t) {
    const Task& task = half.task;
    std::vector<Operand> operands = {{task.d != nullptr, task.d_tangent, 0}, {true, task.d, half.z.image}};
    prepared[t] = {adjoint_stencils(half, operands, call.memory), packed(task.p, half.k, half.c, true, call.memory),
                   packed(task.p_tangent, half.k, half.c, true, call.memory), Adjoint(half, true, call.memory)};
  });
  AdjointSums sums(call);
  for_units(call, team, [&](int s, int64_t part, int64_t first, int64_t last) {
    const Source& source = call.sources[s];
    const Padded& in = call.inputs[s];
    auto [z_most, kb_most] = call.largest(s);
    float* a = of_worker.take(in.image);
    float* g = of_worker.zeros(in.blocks * in.h * in.w * LANES);
    float* z_adjoint = of_worker.take(2 * z_most);
    float* scratch = of_worker.take(kb_most * LANES * call.most_pixels(s));
    for (int64_t image = first; image < last; ++image) {
      rectify<false>(source, call.norms[s], in, image, a);
      bool add = false;
      for (int t : call.tasks[s]) {
        const Half& half = call.halves[t];
        const Prepared& of_task = prepared[t];
        float* zd_adjoint = z_adjoint + half.z.image;
        half.z.clear_border(z_adjoint);
        half.z.clear_border(zd_adjoint);
        for_groups(half, image, [&](int64_t y, int64_t rows, int64_t pixel) {
          int64_t pixels = rows * half.wo;
          ptrdiff_t block = pixels * LANES;
          const float* lanes = of_task.adjoint.lanes(pixel, pixels, false, scratch, block);
          if (half.task.d) adjoint_rows(half, of_task.p, lanes, block, y, rows, z_adjoint);
          adjoint_rows(half, of_task.pd, lanes, block, y, rows, zd_adjoint);
          lanes = of_task.adjoint.lanes(pixel, pixels, true, scratch, block);
          adjoint_rows(half, of_task.p, lanes, block, y, rows, zd_adjoint, true);
        });
        adjoint(half, of_task.stencils, z_adjoint, g, add);
        add = true;
      }
      mask_image(source, call.norms[s], in, g, a, image, call.streamed, sums.at(s, part, SUM_G),
                 sums.at(s, part, SUM_G_H));
    }
  });
  sums.write();
}
