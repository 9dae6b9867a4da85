// Forward and backward over the queries of one image and head, vectorised over channels (samples: over points).
//
// Compiled once for each instruction set; DETFAMILY_ISA names it. Everything lies in an unnamed namespace.
#include "cpu_kernels.h"

#include "geometry.h"

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

namespace detfamily {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

// ---------------------------------------------------------------------------------------------------------- vectors

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int lanes = VECTOR_BYTES / sizeof(T);

template <typename T>
DETFAMILY_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <typename T>
DETFAMILY_INLINE void store(T* to, Vector<T> vector) {
  *reinterpret_cast<Vector<T>*>(to) = vector;
}

// Sums over the lanes of four vectors at once, in an order that depends on the instruction set alone.
typedef float Float4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double Double2 __attribute__((vector_size(16), aligned(8), may_alias));

#if VECTOR_BYTES >= 32
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double4 __attribute__((vector_size(32)));
DETFAMILY_INLINE Float4 fold(Float8 v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
DETFAMILY_INLINE Double2 fold(Double4 v) {
  return __builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3);
}
#endif
#if VECTOR_BYTES == 64
typedef float Float16 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));
DETFAMILY_INLINE Float4 fold(Float16 v) {
  return fold(Float8(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7)) +
              Float8(__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)));
}
DETFAMILY_INLINE Double2 fold(Double8 v) {
  return fold(Double4(__builtin_shufflevector(v, v, 0, 1, 2, 3)) + Double4(__builtin_shufflevector(v, v, 4, 5, 6, 7)));
}
#endif
#if VECTOR_BYTES == 16
DETFAMILY_INLINE Float4 fold(Float4 v) { return v; }
DETFAMILY_INLINE Double2 fold(Double2 v) { return v; }
#endif

DETFAMILY_INLINE void sums(const Vector<float> (&v)[4], float* to) {
  const Float4 a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
  const Float4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Float4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *reinterpret_cast<Float4*>(to) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

DETFAMILY_INLINE void sums(const Vector<double> (&v)[4], double* to) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const Double2 pair = fold(v[i]);
    to[i] = pair[0] + pair[1];
  }
}

// ---------------------------------------------------------------------------------------------------------- samples

// exp(x) for x <= 0: 2^n * p(r) with |r| <= ln(2) / 2. Own, since a call of libm would end the vectorisation.
DETFAMILY_INLINE float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504f + magic) - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9841270e-4f;
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  union {
    int32_t bits;
    float number;
  } power = {(static_cast<int32_t>(n) + 127) << 23};
  return p * power.number;
}

DETFAMILY_INLINE double exp_negative(double x) { return __builtin_exp(x); }

// Views of the scratch memory: one array per quantity, one entry per point.
template <typename T>
struct Samples {
  T *attention, *dx, *dy, *grad_x, *grad_y;
  // Four numbers for each point, one for each corner: upper left, upper right, lower left, lower right.
  T* weights;  // attention times the corner's share
  T* dots;     // backward: grad_output . value at the corner, 0 outside the map
  int32_t *cell, *corners;  // of the upper left corner; bit c: corner c is in the map

  Samples(T* scratch, int points) {
    const int64_t size = (points + 15) / 16 * 16;
    attention = scratch;
    dx = scratch + size;
    dy = scratch + 2 * size;
    grad_x = scratch + 3 * size;
    grad_y = scratch + 4 * size;
    weights = scratch + 5 * size;
    dots = scratch + 9 * size;
    cell = reinterpret_cast<int32_t*>(scratch + 13 * size);
    corners = reinterpret_cast<int32_t*>(scratch + 14 * size);
  }
};

template <typename T>
DETFAMILY_INLINE void softmax(const T* logits, int count, T* weights) {
  T largest = logits[0];
  for (int i = 1; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
  T total = 0;
  for (int i = 0; i < count; ++i) weights[i] = exp_negative(logits[i] - largest);
  for (int i = 0; i < count; ++i) total += weights[i];
  const T scale = T(1) / total;
  for (int i = 0; i < count; ++i) weights[i] *= scale;
}

// COUNT is L * P where it is known at compile time (the usual 4 levels of 4 points), else 0.
template <typename T, int COUNT, Form FORM>
void place_samples(const Points<T>& points, const Slice<T>& slice, int64_t query, Samples<T>& samples) {
  const int count = COUNT ? COUNT : points.count;
  const T* __restrict places = slice.places + query * slice.places_stride;
  const T* __restrict scores = slice.scores + query * slice.scores_stride;
  T* __restrict attention = samples.attention;
  T* __restrict xs = samples.dx;
  T* __restrict ys = samples.dy;
  if (FORM == Form::plain) {
    for (int i = 0; i < count; ++i) attention[i] = scores[i];
    for (int i = 0; i < count; ++i) {
      xs[i] = to_cells(places[2 * i], points.width[i]);
      ys[i] = to_cells(places[2 * i + 1], points.height[i]);
    }
  } else {
    softmax(scores, count, attention);
    const T* __restrict reference = slice.references + query * slice.references_stride;
    const int per_level = points.per_level;
    for (int i = 0; i < count; i += per_level, reference += FORM == Form::box ? 4 : 2) {
      for (int p = i; p < i + per_level; ++p) {
        if (FORM == Form::box) {
          xs[p] = around_box(reference[0], reference[2], places[2 * p], points.half_step, points.width[p]);
          ys[p] = around_box(reference[1], reference[3], places[2 * p + 1], points.half_step, points.height[p]);
        } else {
          xs[p] = around_point(reference[0], places[2 * p], points.width[p]);
          ys[p] = around_point(reference[1], places[2 * p + 1], points.height[p]);
        }
      }
    }
  }
  T* __restrict weights = samples.weights;
  int32_t* __restrict cell = samples.cell;
  int32_t* __restrict corners = samples.corners;
  for (int i = 0; i < count; ++i) {
    const Axis<T> x = split(xs[i], points.width[i]);
    const Axis<T> y = split(ys[i], points.height[i]);
    const int left = x.low >= 0, right = x.low + 1 < points.columns[i];
    const int upper = y.low >= 0, lower = y.low + 1 < points.rows[i];
    const int some = x.inside & y.inside;
    corners[i] = some * ((left & upper) | (right & upper) << 1 | (left & lower) << 2 | (right & lower) << 3);
    cell[i] = points.start[i] + y.low * points.columns[i] + x.low;
    const T top = attention[i] * (T(1) - y.fraction), bottom = attention[i] * y.fraction;
    weights[4 * i] = top * (T(1) - x.fraction);
    weights[4 * i + 1] = top * x.fraction;
    weights[4 * i + 2] = bottom * (T(1) - x.fraction);
    weights[4 * i + 3] = bottom * x.fraction;
    xs[i] = x.fraction;
    ys[i] = y.fraction;
  }
}

template <typename T>
using Place = void (*)(const Points<T>&, const Slice<T>&, int64_t, Samples<T>&);

template <typename T, int COUNT>
Place<T> placing(Form form) {
  if (form == Form::plain) return place_samples<T, COUNT, Form::plain>;
  return form == Form::point ? place_samples<T, COUNT, Form::point> : place_samples<T, COUNT, Form::box>;
}

// ---------------------------------------------------------------------------------------------------------- forward

// Copies of the pointers that the inner loops need: the compiler would read them anew after every store.
template <typename T>
struct Reader {
  const T* value;
  int64_t stride;
  const int32_t *cell, *corners, *columns;

  Reader(const Points<T>& points, const Slice<T>& slice, const Samples<T>& samples)
      : value(slice.value), stride(slice.value_stride), cell(samples.cell), corners(samples.corners),
        columns(points.columns) {}

  // Where the rows of a point's four corners begin.
  DETFAMILY_INLINE void offsets(int i, int64_t stride_, int64_t (&rows)[4]) const {
    rows[0] = cell[i] * stride_;
    rows[1] = rows[0] + stride_;
    rows[2] = rows[0] + columns[i] * stride_;
    rows[3] = rows[2] + stride_;
  }
};

// N vectors of channels stay in registers for all points of a query.
template <typename T, int N>
void gather(const Points<T>& points, const Slice<T>& slice, const Samples<T>& samples, T* output) {
  constexpr int chains = N <= 2 ? 2 : 1;  // few vectors: two sums each, or additions would wait for one another
  const Reader<T> in(points, slice, samples);
  const int count = points.count;
  const T* weight = samples.weights;
  Vector<T> sums[chains][N] = {};
  for (int i = 0; i < count; ++i, weight += 4) {
    const int corners = in.corners[i];
    int64_t rows[4];
    in.offsets(i, in.stride, rows);
    if (__builtin_expect(corners == 15, 1)) {
      UNROLL
      for (int c = 0; c < 4; ++c) {
        UNROLL
        for (int n = 0; n < N; ++n) sums[c % chains][n] += weight[c] * load(in.value + rows[c] + n * lanes<T>);
      }
    } else if (corners) {
      UNROLL
      for (int c = 0; c < 4; ++c) {
        if (!(corners >> c & 1)) continue;
        UNROLL
        for (int n = 0; n < N; ++n) sums[0][n] += weight[c] * load(in.value + rows[c] + n * lanes<T>);
      }
    }
  }
  UNROLL
  for (int n = 0; n < N; ++n) store(output + n * lanes<T>, chains == 2 ? sums[0][n] + sums[chains - 1][n] : sums[0][n]);
}

// Any number of channels.
template <typename T>
void gather_any(const Points<T>& points, const Slice<T>& slice, const Samples<T>& samples, T* __restrict output) {
  const Reader<T> in(points, slice, samples);
  const int width = slice.width;
  for (int d = 0; d < width; ++d) output[d] = 0;
  for (int i = 0; i < points.count; ++i) {
    int64_t rows[4];
    in.offsets(i, in.stride, rows);
    for (int c = 0; c < 4; ++c) {
      if (!(in.corners[i] >> c & 1)) continue;
      const T weight = samples.weights[4 * i + c];
      const T* __restrict row = in.value + rows[c];
      for (int d = 0; d < width; ++d) output[d] += weight * row[d];
    }
  }
}

template <typename T>
void forward(
    Form form, const Points<T>& points, const Slice<T>& slice, int64_t first, int64_t last, T* output,
    int64_t output_stride, T* scratch) {
  Samples<T> samples(scratch, points.count);
  const Place<T> place = points.count == 16 ? placing<T, 16>(form) : placing<T, 0>(form);
  const int vectors = slice.width % lanes<T> ? 0 : slice.width / lanes<T>;
  const auto gather_row = vectors == 1   ? gather<T, 1>
                          : vectors == 2 ? gather<T, 2>
                          : vectors == 4 ? gather<T, 4>
                          : vectors == 8 ? gather<T, 8>
                                         : gather_any<T>;
  for (int64_t q = first; q < last; ++q) {
    place(points, slice, q, samples);
    gather_row(points, slice, samples, output + q * output_stride);
  }
}

// --------------------------------------------------------------------------------------------------------- backward

// Adds to grad_value and leaves the four dots of each point.
template <typename T, int N>
void scatter(
    const Points<T>& points, const Slice<T>& slice, const Gradients<T>& gradients, const T* grad_output,
    const Samples<T>& samples) {
  const Reader<T> in(points, slice, samples);
  T* const grad_value = gradients.value;
  const int64_t grad_stride = gradients.value_stride;
  const int count = points.count;
  const T* weight = samples.weights;
  T* dots = samples.dots;
  Vector<T> grad[N];
  UNROLL
  for (int n = 0; n < N; ++n) grad[n] = load(grad_output + n * lanes<T>);
  const auto corner = [&](const T* row, T* grad_row, T share) __attribute__((always_inline)) {
    Vector<T> product = grad[0] * load(row);
    UNROLL
    for (int n = 1; n < N; ++n) product += grad[n] * load(row + n * lanes<T>);
    UNROLL
    for (int n = 0; n < N; ++n) store(grad_row + n * lanes<T>, load(grad_row + n * lanes<T>) + share * grad[n]);
    return product;
  };
  for (int i = 0; i < count; ++i, weight += 4, dots += 4) {
    const int corners = in.corners[i];
    int64_t rows[4], grad_rows[4];
    in.offsets(i, in.stride, rows);
    in.offsets(i, grad_stride, grad_rows);
    Vector<T> products[4] = {};
    if (__builtin_expect(corners == 15, 1)) {
      UNROLL
      for (int c = 0; c < 4; ++c) products[c] = corner(in.value + rows[c], grad_value + grad_rows[c], weight[c]);
    } else if (corners) {
      UNROLL
      for (int c = 0; c < 4; ++c) {
        if (corners >> c & 1) products[c] = corner(in.value + rows[c], grad_value + grad_rows[c], weight[c]);
      }
    }
    sums(products, dots);
  }
}

template <typename T>
void scatter_any(
    const Points<T>& points, const Slice<T>& slice, const Gradients<T>& gradients, const T* __restrict grad_output,
    const Samples<T>& samples) {
  const Reader<T> in(points, slice, samples);
  const int width = slice.width, whole = width / lanes<T> * lanes<T>;
  for (int i = 0; i < points.count; ++i) {
    int64_t rows[4], grad_rows[4];
    in.offsets(i, in.stride, rows);
    in.offsets(i, gradients.value_stride, grad_rows);
    Vector<T> products[4] = {};
    T rest[4] = {};
    for (int c = 0; c < 4; ++c) {
      if (!(in.corners[i] >> c & 1)) continue;
      const T weight = samples.weights[4 * i + c];
      const T* __restrict row = in.value + rows[c];
      T* __restrict to = gradients.value + grad_rows[c];
      for (int d = 0; d < width; ++d) to[d] += weight * grad_output[d];
      for (int d = 0; d < whole; d += lanes<T>) products[c] += load(grad_output + d) * load(row + d);
      for (int d = whole; d < width; ++d) rest[c] += grad_output[d] * row[d];
    }
    sums(products, samples.dots + 4 * i);
    for (int c = 0; c < 4; ++c) samples.dots[4 * i + c] += rest[c];
  }
}

// From the dots to the gradients of locations (in cells) and of attention weights (both per point).
template <typename T, int COUNT>
void point_gradients(const Points<T>& points, const Samples<T>& samples, T* __restrict grad_attention) {
  const int count = COUNT ? COUNT : points.count;
  const T* __restrict dots = samples.dots;
  const T* __restrict dxs = samples.dx;
  const T* __restrict dys = samples.dy;
  const T* __restrict attention = samples.attention;
  T* __restrict grad_x = samples.grad_x;
  T* __restrict grad_y = samples.grad_y;
  for (int i = 0; i < count; ++i) {
    const T d00 = dots[4 * i], d01 = dots[4 * i + 1], d10 = dots[4 * i + 2], d11 = dots[4 * i + 3];
    const T along_top = d01 - d00, along_bottom = d11 - d10;
    const T top = d00 + dxs[i] * along_top, bottom = d10 + dxs[i] * along_bottom;
    grad_attention[i] = top + dys[i] * (bottom - top);
    grad_x[i] = attention[i] * (along_top + dys[i] * (along_bottom - along_top));
    grad_y[i] = attention[i] * (bottom - top);
  }
}

template <typename T, int COUNT, Form FORM>
void spread_gradients(
    const Points<T>& points, const Slice<T>& slice, const Gradients<T>& gradients, int64_t query, Samples<T>& samples) {
  const int count = COUNT ? COUNT : points.count;
  T* __restrict places = gradients.places + query * slice.places_stride;
  T* __restrict scores = gradients.scores + query * slice.scores_stride;
  point_gradients<T, COUNT>(points, samples, scores);
  const T* __restrict grad_x = samples.grad_x;
  const T* __restrict grad_y = samples.grad_y;
  if (FORM == Form::plain) {
    for (int i = 0; i < count; ++i) {
      places[2 * i] = grad_x[i] * points.width[i];
      places[2 * i + 1] = grad_y[i] * points.height[i];
    }
    return;
  }
  T mean = 0;  // softmax backward
  for (int i = 0; i < count; ++i) mean += samples.attention[i] * scores[i];
  for (int i = 0; i < count; ++i) scores[i] = samples.attention[i] * (scores[i] - mean);
  constexpr int reference_dim = FORM == Form::box ? 4 : 2;
  const T* __restrict reference = slice.references + query * slice.references_stride;
  T* __restrict to = gradients.references ? gradients.references + query * gradients.references_stride : nullptr;
  const T* __restrict offsets = slice.places + query * slice.places_stride;
  for (int i = 0; i < count; i += points.per_level, reference += reference_dim) {
    T x = 0, y = 0, width = 0, height = 0;
    for (int p = i; p < i + points.per_level; ++p) {
      const T location_x = grad_x[p] * points.width[p], location_y = grad_y[p] * points.height[p];
      x += location_x;
      y += location_y;
      if (FORM == Form::box) {
        const T step_x = location_x * points.half_step, step_y = location_y * points.half_step;
        places[2 * p] = step_x * reference[2];
        places[2 * p + 1] = step_y * reference[3];
        width += step_x * offsets[2 * p];
        height += step_y * offsets[2 * p + 1];
      } else {
        places[2 * p] = grad_x[p];
        places[2 * p + 1] = grad_y[p];
      }
    }
    if (to) {
      to[0] = x;
      to[1] = y;
      if (FORM == Form::box) {
        to[2] = width;
        to[3] = height;
      }
      to += reference_dim;
    }
  }
}

template <typename T>
using Spread = void (*)(const Points<T>&, const Slice<T>&, const Gradients<T>&, int64_t, Samples<T>&);

template <typename T, int COUNT>
Spread<T> spreading(Form form) {
  if (form == Form::plain) return spread_gradients<T, COUNT, Form::plain>;
  return form == Form::point ? spread_gradients<T, COUNT, Form::point> : spread_gradients<T, COUNT, Form::box>;
}

template <typename T>
void backward(
    Form form, const Points<T>& points, const Slice<T>& slice, int64_t first, int64_t last,
    const Gradients<T>& gradients, T* scratch) {
  Samples<T> samples(scratch, points.count);
  const Place<T> place = points.count == 16 ? placing<T, 16>(form) : placing<T, 0>(form);
  const Spread<T> spread = points.count == 16 ? spreading<T, 16>(form) : spreading<T, 0>(form);
  const int vectors = slice.width % lanes<T> ? 0 : slice.width / lanes<T>;
  const auto scatter_row = vectors == 1   ? scatter<T, 1>
                           : vectors == 2 ? scatter<T, 2>
                           : vectors == 4 ? scatter<T, 4>
                           : vectors == 8 ? scatter<T, 8>
                                          : scatter_any<T>;
  for (int64_t q = first; q < last; ++q) {
    place(points, slice, q, samples);
    scatter_row(points, slice, gradients, gradients.output + q * gradients.output_stride, samples);
    spread(points, slice, gradients, q, samples);
  }
}

}  // namespace

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)

extern const InstructionSet DETFAMILY_ISA = {
    NAME(DETFAMILY_ISA), {forward<float>, backward<float>}, {forward<double>, backward<double>}};

}  // namespace detfamily
