// CUDA kernels of multi-scale deformable attention, and how they are launched. No header of torch: what is compiled
// here also runs, thread by thread, in the emulator of the tests.
//
// A "pair" is one query and one head. G neighbouring lanes of a warp serve a pair, V channels (16 bytes) each. They
// first divide the pair's samples among themselves, one lane per sample: location, weight, the four rows of `value`
// around it. These go through shared memory to all G lanes, which then load the rows, many at a time. A pair never
// leaves its warp, so no barrier of the block is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "geometry.h"

#if !defined(DETFAMILY_SIMT_EMULATOR)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace detfamily::cuda {

constexpr int kMaxLevels = 16;
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr size_t kSharedLimit = 48 * 1024;  // what a block gets without asking

template <typename S>
constexpr S kInfinity = std::numeric_limits<S>::infinity();

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of all arithmetic and sums.
template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

template <typename S>
struct alignas(2 * sizeof(S)) Two {
  S x, y;
};
template <typename S>
struct alignas(16) Four {
  S v[4];
};

}  // namespace detfamily::cuda

// What the kernels use of the machine; the emulator has the same functions.
#if defined(DETFAMILY_SIMT_EMULATOR)
#include "simt.h"
#else
namespace detfamily::cuda::device {

#define DETFAMILY_DEVICE __device__ __forceinline__

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename X>
DETFAMILY_DEVICE X load(const X* address) {
  return __ldg(address);
}

// For what is read once: it need not push rows of `value` out of the first cache.
DETFAMILY_DEVICE float load_once(const float* address) {
  float x;
  asm("ld.global.nc.L1::no_allocate.f32 %0, [%1];" : "=f"(x) : "l"(address));
  return x;
}
DETFAMILY_DEVICE float2 load_once(const float2* address) {
  float2 x;
  asm("ld.global.nc.L1::no_allocate.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(address));
  return x;
}
template <typename X>
DETFAMILY_DEVICE X load_once(const X* address) {
  return __ldg(address);
}

template <typename X>
DETFAMILY_DEVICE void store(X* address, X x) {
  *address = x;
}

// Row `row` of rows of `width` numbers. Written in C++, it becomes shifts and masks of 64 bits, twice as many
// instructions.
template <typename X>
DETFAMILY_DEVICE X* at_row(X* first, unsigned row, int width) {
  uint64_t address;
  asm("mad.wide.u32 %0, %1, %2, %3;"
      : "=l"(address)
      : "r"(row), "r"(static_cast<unsigned>(width * sizeof(X))), "l"(reinterpret_cast<uint64_t>(first)));
  return reinterpret_cast<X*>(address);
}

// Additions to global memory without a result. The functions of CUDA take any memory, and where the compiler cannot
// tell which, they become a choice between an atomic operation and a loop.
DETFAMILY_DEVICE void add(float* address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "f"(x));
}
DETFAMILY_DEVICE void add(double* address, double x) {
  asm volatile("red.global.add.f64 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "d"(x));
}
DETFAMILY_DEVICE void add(long long* address, long long x) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "l"(x));  // wraps alike
}
DETFAMILY_DEVICE void add(float4* address, float4 x) {
#if __CUDA_ARCH__ >= 900
  const size_t global = __cvta_generic_to_global(address);
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w));
#else
  float* each = reinterpret_cast<float*>(address);
  add(each, x.x);
  add(each + 1, x.y);
  add(each + 2, x.z);
  add(each + 3, x.w);
#endif
}
DETFAMILY_DEVICE void raise(unsigned long long* address, unsigned long long x) { atomicMax(address, x); }

template <typename X>
DETFAMILY_DEVICE X shuffle(X x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
template <typename X>
DETFAMILY_DEVICE X shuffle_xor(X x, int lanes) {
  return __shfl_xor_sync(kAllLanes, x, lanes);
}
DETFAMILY_DEVICE unsigned ballot(bool x) { return __ballot_sync(kAllLanes, x); }
DETFAMILY_DEVICE void warp_sync() { __syncwarp(); }

DETFAMILY_DEVICE char* dynamic_shared() {
  extern __shared__ uint4 shared[];
  return reinterpret_cast<char*>(shared);
}

DETFAMILY_DEVICE float exponential(float x) { return expf(x); }
DETFAMILY_DEVICE double exponential(double x) { return exp(x); }
DETFAMILY_DEVICE int lowest_bit(unsigned x) { return __ffs(static_cast<int>(x)) - 1; }
DETFAMILY_DEVICE unsigned bits(float x) { return __float_as_uint(x); }
DETFAMILY_DEVICE unsigned long long bits(double x) { return static_cast<unsigned long long>(__double_as_longlong(x)); }
DETFAMILY_DEVICE float from_bits(unsigned x) { return __uint_as_float(x); }
DETFAMILY_DEVICE double from_bits(unsigned long long x) { return __longlong_as_double(static_cast<long long>(x)); }
DETFAMILY_DEVICE long long to_integer(float x) { return __float2ll_rn(x); }
DETFAMILY_DEVICE long long to_integer(double x) { return __double2ll_rn(x); }

DETFAMILY_DEVICE float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
DETFAMILY_DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
DETFAMILY_DEVICE Half narrow(float x, Half) { return {__half_as_ushort(__float2half_rn(x))}; }
DETFAMILY_DEVICE BFloat16 narrow(float x, BFloat16) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
DETFAMILY_DEVICE unsigned narrow_two(float low, float high, Half) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}
DETFAMILY_DEVICE unsigned narrow_two(float low, float high, BFloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

}  // namespace detfamily::cuda::device
#endif

namespace detfamily::cuda {

// ---------------------------------------------------------------------------------------------------------------------
// Numbers of 16, 32 and 64 bits, alone, in twos and in lanes of 16 bytes.

DETFAMILY_DEVICE float widen(float x) { return x; }
DETFAMILY_DEVICE double widen(double x) { return x; }
DETFAMILY_DEVICE float widen(Half x) { return device::widen(x); }
DETFAMILY_DEVICE float widen(BFloat16 x) { return device::widen(x); }

DETFAMILY_DEVICE float widen_low(unsigned word, Half) { return device::widen(Half{static_cast<uint16_t>(word)}); }
DETFAMILY_DEVICE float widen_high(unsigned word, Half) {
  return device::widen(Half{static_cast<uint16_t>(word >> 16)});
}
DETFAMILY_DEVICE float widen_low(unsigned word, BFloat16) { return device::from_bits(word << 16); }
DETFAMILY_DEVICE float widen_high(unsigned word, BFloat16) { return device::from_bits(word & 0xffff0000u); }

template <typename T>
DETFAMILY_DEVICE T narrow(float x) {
  return device::narrow(x, T{});
}
template <>
DETFAMILY_DEVICE float narrow<float>(float x) {
  return x;
}
template <typename T>
DETFAMILY_DEVICE T narrow(double x) {
  return x;
}

template <typename T>
DETFAMILY_DEVICE T read(const T* address) {
  return device::load(address);
}
DETFAMILY_DEVICE Half read(const Half* address) { return {device::load(&address->bits)}; }
DETFAMILY_DEVICE BFloat16 read(const BFloat16* address) { return {device::load(&address->bits)}; }

template <typename T>
DETFAMILY_DEVICE void write(T* address, T x) {
  device::store(address, x);
}

DETFAMILY_DEVICE Two<float> read_two(const float* address) {
  const float2 both = device::load_once(reinterpret_cast<const float2*>(address));
  return {both.x, both.y};
}
DETFAMILY_DEVICE Two<double> read_two(const double* address) {
  const double2 both = device::load_once(reinterpret_cast<const double2*>(address));
  return {both.x, both.y};
}
template <typename T>
DETFAMILY_DEVICE Two<float> read_two(const T* address) {
  const unsigned word = device::load_once(reinterpret_cast<const unsigned*>(address));
  return {widen_low(word, T{}), widen_high(word, T{})};
}

DETFAMILY_DEVICE void write_two(float* address, float x, float y) {
  device::store(reinterpret_cast<float2*>(address), float2{x, y});
}
DETFAMILY_DEVICE void write_two(double* address, double x, double y) {
  device::store(reinterpret_cast<double2*>(address), double2{x, y});
}
template <typename T>
DETFAMILY_DEVICE void write_two(T* address, float x, float y) {
  device::store(reinterpret_cast<unsigned*>(address), device::narrow_two(x, y, T{}));
}

// V neighbouring channels: kept as they were loaded until they are used, so that many loads can be under way.
template <typename T, int V>
struct Channels {
  static_assert(V == 1);
  using Sum = typename SumOf<T>::type;
  T raw;
  DETFAMILY_DEVICE void load(const T* address) { raw = read(address); }
  DETFAMILY_DEVICE Sum operator[](int) const { return widen(raw); }
  DETFAMILY_DEVICE static void store(T* address, const Sum (&x)[1]) { write(address, narrow<T>(x[0])); }
};
template <>
struct Channels<float, 4> {
  float4 raw;
  DETFAMILY_DEVICE void load(const float* address) { raw = device::load(reinterpret_cast<const float4*>(address)); }
  DETFAMILY_DEVICE float operator[](int i) const { return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w; }
  DETFAMILY_DEVICE static void store(float* address, const float (&x)[4]) {
    device::store(reinterpret_cast<float4*>(address), float4{x[0], x[1], x[2], x[3]});
  }
};
template <typename T>
struct Channels<T, 8> {
  uint4 raw;
  DETFAMILY_DEVICE void load(const T* address) { raw = device::load(reinterpret_cast<const uint4*>(address)); }
  DETFAMILY_DEVICE float operator[](int i) const {
    const unsigned word = i < 2 ? raw.x : i < 4 ? raw.y : i < 6 ? raw.z : raw.w;
    return i % 2 == 0 ? widen_low(word, T{}) : widen_high(word, T{});
  }
  DETFAMILY_DEVICE static void store(T* address, const float (&x)[8]) {
    const T kind{};
    const uint4 words{device::narrow_two(x[0], x[1], kind), device::narrow_two(x[2], x[3], kind),
                      device::narrow_two(x[4], x[5], kind), device::narrow_two(x[6], x[7], kind)};
    device::store(reinterpret_cast<uint4*>(address), words);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Sizes, and which pairs a block serves.

// Division of numbers below 2^31 by a number that is the same for a whole launch.
struct Divider {
  unsigned divisor = 1, factor = 1u << 31, shift = 31;

  Divider() = default;
  explicit Divider(unsigned by) : divisor(by > 1 ? by : 1) {
    unsigned power = 0;
    while ((1ull << power) < divisor) ++power;
    shift = 31 + power;
    factor = static_cast<unsigned>(((1ull << shift) + divisor - 1) / divisor);
  }
  DETFAMILY_INLINE unsigned operator()(unsigned n) const {
    return static_cast<unsigned>((static_cast<unsigned long long>(n) * factor) >> shift);
  }
};

constexpr int kTile = 8;  // queries of an encoder are served in squares of the map: neighbours sample the same rows

struct Problem {
  int batch, tokens, queries, heads, width, levels, points;
  int samples;  // per pair: levels * points
  int pairs;    // per image: queries * heads
  Divider by_heads, by_points;
  int height[kMaxLevels], across[kMaxLevels], start[kMaxLevels];  // of each level; start in tokens

  bool tiled;
  int pairs_per_block;             // where not tiled
  int heads_per_tile, tile_heads;  // heads served by one block; blocks that share a tile
  int tiles;                       // of all levels
  Divider by_tile_heads;
  int tiles_before[kMaxLevels];
  Divider by_tiles_across[kMaxLevels];
};

inline int ceil_divide(int a, int b) { return (a + b - 1) / b; }

inline Problem make_problem(
    int batch, int queries, int heads, int width, int levels, int points, const int64_t* height_width) {
  Problem problem{};
  problem.batch = batch, problem.queries = queries, problem.heads = heads, problem.width = width;
  problem.levels = levels, problem.points = points;
  problem.samples = levels * points;
  problem.pairs = queries * heads;
  problem.by_heads = Divider(heads);
  problem.by_points = Divider(points);
  for (int level = 0; level < levels; ++level) {
    const int h = static_cast<int>(height_width[2 * level]), w = static_cast<int>(height_width[2 * level + 1]);
    problem.height[level] = h;
    problem.across[level] = w;
    problem.start[level] = problem.tokens;
    problem.tokens += h * w;
    problem.tiles_before[level] = problem.tiles;
    problem.by_tiles_across[level] = Divider(ceil_divide(w, kTile));
    problem.tiles += ceil_divide(h, kTile) * ceil_divide(w, kTile);
  }
  problem.tiled = queries == problem.tokens;
  return problem;
}

struct Pair {
  int query, head;
};

// Of all images.
DETFAMILY_DEVICE int64_t query_index(const Problem& problem, int image, const Pair& pair) {
  return static_cast<int64_t>(image) * problem.queries + pair.query;
}
DETFAMILY_DEVICE int64_t pair_index(const Problem& problem, int image, const Pair& pair) {
  return query_index(problem, image, pair) * problem.heads + pair.head;
}

class Pairs {
 public:
  DETFAMILY_DEVICE Pairs(const Problem& problem, unsigned block) : problem_(problem) {
    if (!problem.tiled) {
      first_ = static_cast<int>(block) * problem.pairs_per_block;
      count_ = min(problem.pairs_per_block, problem.pairs - first_);
      return;
    }
    unsigned tile = problem.by_tile_heads(block);
    head_ = static_cast<int>(block - tile * problem.by_tile_heads.divisor) * problem.heads_per_tile;
    int level = 0;
    while (level + 1 < problem.levels && tile >= static_cast<unsigned>(problem.tiles_before[level + 1])) ++level;
    tile -= problem.tiles_before[level];
    const int row = static_cast<int>(problem.by_tiles_across[level](tile));
    const int column = static_cast<int>(tile) - row * static_cast<int>(problem.by_tiles_across[level].divisor);
    stride_ = problem.across[level];
    across_ = min(kTile, stride_ - column * kTile);
    first_ = problem.start[level] + row * kTile * stride_ + column * kTile;
    count_ = min(kTile, problem.height[level] - row * kTile) * across_ * problem.heads_per_tile;
  }

  DETFAMILY_DEVICE int count() const { return count_; }

  DETFAMILY_DEVICE Pair operator[](int i) const {
    if (!problem_.tiled) {
      const int pair = first_ + i;
      const int query = static_cast<int>(problem_.by_heads(pair));
      return {query, pair - query * problem_.heads};
    }
    const int second = problem_.heads_per_tile - 1;  // 0 or 1
    const int query = i >> second;
    const int row = static_cast<int>(static_cast<unsigned>(query) / static_cast<unsigned>(across_));
    return {first_ + row * stride_ + query - row * across_, head_ + (i & second)};
  }

 private:
  const Problem& problem_;
  int first_, count_, head_ = 0, stride_ = 0, across_ = 1;
};

// The place of a thread among the G lanes of its pair.
template <int G>
struct Team {
  static constexpr int kLanes = G;
  static constexpr int kPairs = kWarp / G;  // of a warp
  int warp = static_cast<int>(threadIdx.x) / kWarp;
  int group = static_cast<int>(threadIdx.x) % kWarp / G;
  int lane = static_cast<int>(threadIdx.x) % G;

  template <typename S>
  DETFAMILY_DEVICE S sum(S x) const {
#pragma unroll
    for (int lanes = 1; lanes < G; lanes *= 2) x += device::shuffle_xor(x, lanes);
    return x;
  }
  template <typename S>
  DETFAMILY_DEVICE S maximum(S x) const {
#pragma unroll
    for (int lanes = 1; lanes < G; lanes *= 2) {
      const S other = device::shuffle_xor(x, lanes);
      x = other > x ? other : x;
    }
    return x;
  }
  DETFAMILY_DEVICE unsigned votes(bool x) const {
    return (device::ballot(x) >> (group * G)) & (G == kWarp ? ~0u : (1u << G) - 1u);
  }
  template <typename X>
  DETFAMILY_DEVICE X from(X x, int other) const {
    return device::shuffle(x, group * G + other);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Where samples and their weights come from. Each source has a Row (a pair), a Raw (a sample as it was loaded), and
// says where a sample lies in cells; `finish` and `close` write the gradients of what it was made from.

template <typename S>
struct Place {
  S x, y, weight;
};

// Gradient of a weight, and of a place in cells.
template <typename S>
struct PlaceGradient {
  S weight, x, y;
};

template <typename T>
struct Plain {
  using S = typename SumOf<T>::type;
  static constexpr bool kProjected = false;
  const S* locations;
  const S* weights;
  S* grad_locations;
  S* grad_weights;

  struct Row {
    int64_t first;
  };
  struct Raw {
    Two<S> place;
    S weight;
  };

  template <typename Team>
  DETFAMILY_DEVICE Row open(const Problem& problem, int64_t pair, int64_t, bool, const Team&) const {
    return {pair * problem.samples};
  }
  DETFAMILY_DEVICE Raw fetch(const Row& row, int sample) const {
    return {read_two(locations + 2 * (row.first + sample)), device::load_once(weights + row.first + sample)};
  }
  DETFAMILY_DEVICE Place<S> place(const Row&, const Raw& raw, int, S w, S h) const {
    return {to_cells(raw.place.x, w), to_cells(raw.place.y, h), raw.weight};
  }
  DETFAMILY_DEVICE void finish(
      const Row& row, int sample, int, S, S w, S h, const PlaceGradient<S>& grad, Two<S>*, Two<S>*) const {
    write_two(grad_locations + 2 * (row.first + sample), grad.x * w, grad.y * h);
    write(grad_weights + row.first + sample, grad.weight);
  }
  template <typename Team>
  DETFAMILY_DEVICE void close(
      const Problem&, const Row&, int64_t, bool, const Two<S>*, const Two<S>*, const Team&) const {}
};

template <typename T>
struct Projected {
  using S = typename SumOf<T>::type;
  static constexpr bool kProjected = true;
  const S* references;
  int reference_width;  // 2: points; 4: boxes
  S half_step;          // 0.5 / points
  bool narrow_inputs;   // offsets and logits, and their gradients, are of type T, not S
  const void* offsets;
  const void* logits;
  void* grad_offsets;
  void* grad_logits;
  S* grad_references;  // of each head: (B, Q, M, L, R); null where nobody asks

  struct Row {
    int64_t first;      // of the samples
    const S* reference;  // of level 0
    S maximum, inverse;  // of the logits; of the sum of their exponentials
  };
  struct Raw {
    Two<S> offset;
    S logit;
  };

  DETFAMILY_DEVICE S logit(int64_t i) const {
    if constexpr (sizeof(T) == 2) {
      if (narrow_inputs) return widen(read(static_cast<const T*>(logits) + i));
    }
    return read(static_cast<const S*>(logits) + i);
  }
  DETFAMILY_DEVICE Two<S> offset(int64_t i) const {
    if constexpr (sizeof(T) == 2) {
      if (narrow_inputs) return read_two(static_cast<const T*>(offsets) + 2 * i);
    }
    return read_two(static_cast<const S*>(offsets) + 2 * i);
  }

  // `real` is false for lanes that serve no pair, but must take part in the exchange.
  template <typename Team>
  DETFAMILY_DEVICE Row open(const Problem& problem, int64_t pair, int64_t query, bool real, const Team& team) const {
    const int64_t first = pair * problem.samples;
    const S least = -kInfinity<S>;
    S highest = least, total = S(0);
    constexpr int kAtOnce = 4;
    for (int sample = team.lane; real && sample < problem.samples; sample += kAtOnce * Team::kLanes) {
      S x[kAtOnce];
      S top = highest;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int other = sample + k * Team::kLanes;
        x[k] = other < problem.samples ? logit(first + other) : least;
        top = x[k] > top ? x[k] : top;
      }
      const S base = top == least ? S(0) : top;  // all -inf so far: no difference of infinities
      total *= device::exponential(highest - base);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) total += device::exponential(x[k] - base);
      highest = top;
    }
    const S maximum = team.maximum(highest);
    total *= device::exponential(highest - (maximum == least ? S(0) : maximum));
    const S* reference = references + query * problem.levels * reference_width;
    return {first, reference, maximum, S(1) / team.sum(total)};
  }
  DETFAMILY_DEVICE Raw fetch(const Row& row, int sample) const {
    return {offset(row.first + sample), logit(row.first + sample)};
  }
  DETFAMILY_DEVICE Two<S> reference(const Row& row, int level, int part) const {
    const S* address = row.reference + level * reference_width + part;
    return {read(address), read(address + 1)};
  }
  DETFAMILY_DEVICE Place<S> place(const Row& row, const Raw& raw, int level, S w, S h) const {
    const S weight = device::exponential(raw.logit - row.maximum) * row.inverse;
    const Two<S> center = reference(row, level, 0);
    if (reference_width == 2) {
      return {around_point(center.x, raw.offset.x, w), around_point(center.y, raw.offset.y, h), weight};
    }
    const Two<S> extent = reference(row, level, 2);
    return {around_box(center.x, extent.x, raw.offset.x, half_step, w),
            around_box(center.y, extent.y, raw.offset.y, half_step, h), weight};
  }
  // The softmax mixes all samples of a pair: its gradient waits in shared memory until the last is known.
  DETFAMILY_DEVICE void finish(const Row& row, int sample, int level, S weight, S w, S h, const PlaceGradient<S>& grad,
                               Two<S>* kept_weights, Two<S>* kept_places) const {
    kept_weights[sample] = {weight, grad.weight};
    if (grad_references != nullptr) kept_places[sample] = {grad.x * w, grad.y * h};
    Two<S> x{grad.x, grad.y};
    if (reference_width == 4) {
      const Two<S> extent = reference(row, level, 2);
      x = {grad.x * w * extent.x * half_step, grad.y * h * extent.y * half_step};
    }
    const int64_t i = 2 * (row.first + sample);
    if constexpr (sizeof(T) == 2) {
      if (narrow_inputs) return write_two(static_cast<T*>(grad_offsets) + i, x.x, x.y);
    }
    write_two(static_cast<S*>(grad_offsets) + i, x.x, x.y);
  }
  template <typename Team>
  DETFAMILY_DEVICE void close(const Problem& problem, const Row& row, int64_t pair, bool real,
                              const Two<S>* kept_weights, const Two<S>* kept_places, const Team& team) const {
    S mean = S(0);
    for (int sample = team.lane; real && sample < problem.samples; sample += Team::kLanes) {
      mean += kept_weights[sample].x * kept_weights[sample].y;
    }
    mean = team.sum(mean);
    for (int sample = team.lane; real && sample < problem.samples; sample += Team::kLanes) {
      write_logit(row.first + sample, kept_weights[sample].x * (kept_weights[sample].y - mean));
    }
    if (grad_references == nullptr) return;
    device::warp_sync();  // now lanes read what others kept
    const int parts = problem.levels * reference_width;
    for (int i = team.lane; real && i < parts; i += Team::kLanes) {
      write(grad_references + pair * parts + i, reference_gradient(problem, row, i, kept_places));
    }
  }
  DETFAMILY_DEVICE void write_logit(int64_t i, S x) const {
    if constexpr (sizeof(T) == 2) {
      if (narrow_inputs) return write(static_cast<T*>(grad_logits) + i, narrow<T>(x));
    }
    write(static_cast<S*>(grad_logits) + i, x);
  }
  DETFAMILY_DEVICE S reference_gradient(
      const Problem& problem, const Row& row, int i, const Two<S>* kept_places) const {
    const int level = reference_width == 2 ? i / 2 : i / 4;
    const bool vertical = i % 2 != 0, extent = i % reference_width >= 2;
    S total = S(0);
    for (int sample = level * problem.points; sample < (level + 1) * problem.points; ++sample) {
      const S grad = vertical ? kept_places[sample].y : kept_places[sample].x;
      if (!extent) {
        total += grad;
      } else {
        const Two<S> shift = offset(row.first + sample);
        total += grad * (vertical ? shift.y : shift.x) * half_step;
      }
    }
    return total;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// One sample between four rows of `value`, and the shared memory that carries it to all lanes of its pair.

template <typename S>
struct Sample {
  Axis<S> x, y;
  bool left, right, top, bottom;  // which columns and rows of corners are in the map; none if the sample is outside
  Four<unsigned> rows;            // token * heads + head, of corners in the map; of one of them where a corner is not

  Sample() = default;
  DETFAMILY_DEVICE Sample(const Problem& problem, const Place<S>& place, int level, int head, S w, S h)
      : x(split(place.x, w)), y(split(place.y, h)) {
    const int across = problem.across[level], height = problem.height[level];
    const bool counts = x.inside && y.inside && across > 0 && height > 0;
    left = counts && x.low >= 0;
    right = counts && x.low + 1 < across;
    top = counts && y.low >= 0;
    bottom = counts && y.low + 1 < height;
    const int west = max(x.low, 0), east = min(x.low + 1, across - 1);
    const int north = problem.start[level] + max(y.low, 0) * across;
    const int south = problem.start[level] + min(y.low + 1, height - 1) * across;
    const unsigned heads = problem.heads;
    rows = {{(north + west) * heads + head, (north + east) * heads + head, (south + west) * heads + head,
             (south + east) * heads + head}};
  }
  DETFAMILY_DEVICE bool inside() const { return left || right; }
  DETFAMILY_DEVICE Four<S> weights(S weight) const {
    const S upper = (S(1) - y.fraction) * weight, lower = y.fraction * weight;
    return {{top && left ? upper * (S(1) - x.fraction) : S(0), top && right ? upper * x.fraction : S(0),
             bottom && left ? lower * (S(1) - x.fraction) : S(0), bottom && right ? lower * x.fraction : S(0)}};
  }
  // From the products of grad_output with the four corners.
  DETFAMILY_DEVICE PlaceGradient<S> gradient(S weight, const Four<S>& dots) const {
    const S a = top && left ? dots.v[0] : S(0), b = top && right ? dots.v[1] : S(0);
    const S c = bottom && left ? dots.v[2] : S(0), d = bottom && right ? dots.v[3] : S(0);
    const S upper = S(1) - y.fraction, lower = y.fraction, west = S(1) - x.fraction, east = x.fraction;
    if (!inside()) return {S(0), S(0), S(0)};  // the weight may be anything
    return {upper * (west * a + east * b) + lower * (west * c + east * d), weight * (upper * (b - a) + lower * (d - c)),
            weight * (west * (c - a) + east * (d - b))};
  }
};

template <typename S, int G, bool BACKWARD>
class Slots {
 public:
  static constexpr int kCount = G < 4 ? 4 : G;  // samples prepared at a time
  static constexpr int kPerLane = kCount / G;
  static constexpr int kStride = kCount + 1;  // odd: pairs of a warp read different banks
  static constexpr int kPerWarp = kWarp / G * kStride;
  static constexpr size_t kBytes = kPerWarp * (sizeof(Four<S>) * (BACKWARD ? 2 : 1) + sizeof(Four<unsigned>));

  DETFAMILY_DEVICE Slots(char* shared, const Team<G>& team) {
    char* warp = shared + team.warp * kBytes;
    const int first = team.group * kStride;
    weights = reinterpret_cast<Four<S>*>(warp) + first;
    rows = reinterpret_cast<Four<unsigned>*>(warp + kPerWarp * sizeof(Four<S>)) + first;
    dots = reinterpret_cast<Four<S>*>(warp + kPerWarp * (sizeof(Four<S>) + sizeof(Four<unsigned>))) + first;
  }

  Four<S>* weights;
  Four<unsigned>* rows;
  Four<S>* dots;  // backward only
};

// Sums over the lanes of a team, of N numbers at once: lanes exchange halves of what they hold, and each is left with
// N / G sums (or one, which several lanes then share).
template <int N, int G, int STEP, typename S>
DETFAMILY_DEVICE void exchange(S* x, int lane) {
  if constexpr (STEP < G) {
    if constexpr (N > 1) {
      const bool upper = (lane & STEP) != 0;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const S sent = upper ? x[i] : x[i + N / 2], kept = upper ? x[i + N / 2] : x[i];
        x[i] = kept + device::shuffle_xor(sent, STEP);
      }
      exchange<N / 2, G, STEP * 2>(x, lane);
    } else {
      x[0] += device::shuffle_xor(x[0], STEP);
      exchange<1, G, STEP * 2>(x, lane);
    }
  }
}

// Which of the N sums a lane is left with.
template <int N, int G>
DETFAMILY_DEVICE int exchanged(int lane) {
  int index = 0;
#pragma unroll
  for (int step = 1, half = N / 2; step < G && half > 0; step *= 2, half /= 2) index += (lane & step) != 0 ? half : 0;
  return index;
}

// The samples of a pair that a lane prepares, kCount samples of the pair at a time.
template <typename S, int G, typename Source>
struct Own {
  static constexpr int kCount = Slots<S, G, false>::kCount;
  static constexpr int kPerLane = Slots<S, G, false>::kPerLane;
  typename Source::Raw raw[kPerLane];

  // Before its samples are needed: the loads are then under way while others are used.
  DETFAMILY_DEVICE void fetch(
      const Problem& problem, const Source& source, const typename Source::Row& row, int first, bool real, int lane) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int sample = first + lane + k * G;
      raw[k] = {};
      if (real && sample < problem.samples) raw[k] = source.fetch(row, sample);
    }
  }
};

template <typename S>
struct Level {
  int index;
  S w, h;
  DETFAMILY_DEVICE Level(const Problem& problem, int sample)
      : index(static_cast<int>(problem.by_points(sample))),
        w(static_cast<S>(problem.across[index])),
        h(static_cast<S>(problem.height[index])) {}
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward.

// Samples outside their map must not be read, for zero times NaN is NaN. In their stead, with weight zero, goes a row
// that another sample of the pair reads anyhow: all loads then stay unconditional. False if none of these samples is
// inside.
template <typename S, int G, typename Source>
DETFAMILY_DEVICE bool prepare_reads(const Problem& problem, const Source& source, const typename Source::Row& row,
                                    int head, const Own<S, G, Source>& own, int first, bool real,
                                    const Slots<S, G, false>& slots, const Team<G>& team) {
  constexpr int kPerLane = Slots<S, G, false>::kPerLane;
  bool inside[kPerLane], any = false;
  Four<unsigned> rows[kPerLane];
  unsigned read = 0;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int index = first + team.lane + k * G;
    const bool counts = real && index < problem.samples;
    const Level<S> level(problem, counts ? index : 0);
    const Place<S> place = source.place(row, own.raw[k], level.index, level.w, level.h);
    const Sample<S> sample(problem, place, level.index, head, level.w, level.h);
    inside[k] = counts && sample.inside();
    rows[k] = sample.rows;
    Four<S> weights = sample.weights(place.weight);
#pragma unroll
    for (int c = 0; c < 4; ++c) weights.v[c] = inside[k] ? weights.v[c] : S(0);
    slots.weights[team.lane + k * G] = weights;
    read = inside[k] && !any ? rows[k].v[0] : read;
    any = any || inside[k];
  }
  const unsigned votes = team.votes(any);
  const unsigned stand_in = team.from(read, votes == 0 ? 0 : device::lowest_bit(votes));
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
#pragma unroll
    for (int c = 0; c < 4; ++c) rows[k].v[c] = inside[k] ? rows[k].v[c] : stand_in;
    slots.rows[team.lane + k * G] = rows[k];
  }
  return votes != 0;
}

template <typename T, int V, int G, bool EXACT, typename Source>
__global__ void __launch_bounds__(kThreads, EXACT ? 3 : 2)
    forward_kernel(const __grid_constant__ Problem problem, const T* __restrict__ value,
                   const __grid_constant__ Source source, T* __restrict__ output) {
  using S = typename SumOf<T>::type;
  using Room = Slots<S, G, false>;
  constexpr int kAtOnce = 4;
  const Team<G> team;
  const Room slots(device::dynamic_shared(), team);
  const Pairs pairs(problem, blockIdx.x);
  const int width = EXACT ? V * G : problem.width;
  for (int image = blockIdx.y; image < problem.batch; image += gridDim.y) {
    const T* map = value + static_cast<int64_t>(image) * problem.tokens * problem.heads * width;
    for (int begin = team.warp * Team<G>::kPairs; begin < pairs.count(); begin += blockDim.x / G) {
      const bool real = begin + team.group < pairs.count();
      const Pair pair = pairs[real ? begin + team.group : begin];
      const auto row =
          source.open(problem, pair_index(problem, image, pair), query_index(problem, image, pair), real, team);
      for (int base = 0; base < width; base += V * G) {
        const int channel = base + team.lane * V;
        const bool covered = EXACT || channel < width;
        S sums[V] = {};
        Own<S, G, Source> own;
        own.fetch(problem, source, row, 0, real, team.lane);
        for (int first = 0; first < problem.samples; first += Room::kCount) {
          const bool any = prepare_reads(problem, source, row, pair.head, own, first, real, slots, team);
          device::warp_sync();
          own.fetch(problem, source, row, first + Room::kCount, real, team.lane);
          const int count = any && covered ? min(Room::kCount, problem.samples - first) : 0;
#pragma unroll 1
          for (int begun = 0; begun < count; begun += kAtOnce) {
            Channels<T, V> corners[kAtOnce][4];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              const Four<unsigned> rows = slots.rows[begun + k];
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                corners[k][c].load(device::at_row(map + channel, rows.v[c], width));
              }
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              const Four<S> weights = slots.weights[begun + k];
#pragma unroll
              for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int i = 0; i < V; ++i) sums[i] += weights.v[c] * corners[k][c][i];
              }
            }
          }
          device::warp_sync();
        }
        if (real && covered) Channels<T, V>::store(output + pair_index(problem, image, pair) * width + channel, sums);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward.

// Where the gradient of `value` is summed. By default in floating point, in an order that changes from run to run. In
// fixed point of 64 bits the order does not matter: integers add up exactly. The scale follows from the largest
// grad_output and the largest weight, so that no sum can overflow.
template <typename S>
struct ValueSums {
  S* plain;                          // null in fixed point
  long long* fixed;
  const unsigned long long* bounds;  // bits of max |grad_output| and, unless after a softmax, of max |weight|
  bool softmax;
  int count_bits;  // no more than 2^count_bits samples add to one number
};

template <typename S>
struct Format;
template <>
struct Format<float> {
  using Bits = unsigned;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct Format<double> {
  using Bits = unsigned long long;
  static constexpr int kMantissa = 52, kBias = 1023;
};

template <typename S>
struct FixedPoint {
  bool finite;
  int exponent;  // one is 2^exponent

  DETFAMILY_DEVICE explicit FixedPoint(const ValueSums<S>& sums) {
    constexpr int kBias = Format<S>::kBias;
    // numbers with these exponents are below 2^(exponent + 1)
    const int gradient = static_cast<int>(device::load(sums.bounds) >> Format<S>::kMantissa) - kBias;
    const int weight =
        sums.softmax ? 0 : static_cast<int>(device::load(sums.bounds + 1) >> Format<S>::kMantissa) - kBias;
    finite = gradient <= kBias && weight <= kBias && gradient + weight + 2 <= kBias;
    exponent = min(62 - sums.count_bits - (gradient + 1) - (weight + 1), kBias - 1);
  }
  DETFAMILY_DEVICE S scale() const {
    const auto biased = static_cast<typename Format<S>::Bits>(exponent + Format<S>::kBias);
    return device::from_bits(biased << Format<S>::kMantissa);
  }
  DETFAMILY_DEVICE S value(long long sum) const {
    const auto inverse = static_cast<unsigned long long>(Format<double>::kBias - exponent) << Format<double>::kMantissa;
    return static_cast<S>(static_cast<double>(sum) * device::from_bits(inverse));
  }
};

// Where a lane's channels of the sums lie. Sums of 16-bit values are of 32 bits, two times 16 bytes a lane: where D is
// known (EXACT), the first halves of all lanes come before the second ones, so that each addition of a warp covers
// whole sectors of memory; `narrow_kernel` puts them back in order. Sums of 32-bit values lie as the values do: their
// addresses differ from those of the values by one number.
template <typename T, int V, int G, bool EXACT>
class SumsOfImage {
 public:
  using S = typename SumOf<T>::type;

  DETFAMILY_DEVICE SumsOfImage(const ValueSums<S>& sums, int64_t offset, const T* map) {
    if constexpr (V == 1) {
      if (sums.fixed != nullptr) fixed_ = sums.fixed + offset;
    }
    plain_ = sums.plain + offset;
    apart_ = reinterpret_cast<uintptr_t>(plain_) - reinterpret_cast<uintptr_t>(map);
  }

  // One corner's share, V channels of weight * grad_output; `from` is where the values of that corner lie.
  DETFAMILY_DEVICE void add(const T* from, unsigned row, int width, int channel, S weight, S scale,
                            const S (&grad)[V]) const {
    if constexpr (V == 1) {
      if (fixed_ == nullptr) {
        device::add(device::at_row(plain_ + channel, row, width), weight * grad[0]);
      } else {
        device::add(device::at_row(fixed_ + channel, row, width), device::to_integer(weight * grad[0] * scale));
      }
    } else {
      constexpr int kNext = EXACT ? 4 * G : 4;
      float* address;
      if constexpr (sizeof(T) == sizeof(S)) {
        address = reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(from) + apart_);
      } else {
        address = device::at_row(plain_ + (EXACT ? channel / V * 4 : channel), row, width);
      }
#pragma unroll
      for (int k = 0; k < V / 4; ++k) {
        device::add(reinterpret_cast<float4*>(address + k * kNext),
                    float4{weight * grad[4 * k], weight * grad[4 * k + 1], weight * grad[4 * k + 2],
                           weight * grad[4 * k + 3]});
      }
    }
  }

 private:
  S* plain_;
  long long* fixed_ = nullptr;
  uintptr_t apart_;
};

template <typename T, int V>
DETFAMILY_DEVICE void read_channels(const T* address, bool there, typename SumOf<T>::type (&x)[V]) {
  Channels<T, V> channels{};
  if (there) channels.load(address);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = channels[i];
}

// A lane's own samples between their preparation and the gradients of their places and weights.
template <typename S, int G>
struct Prepared {
  using Room = Slots<S, G, true>;
  bool any = false;  // of them is inside its map
  Sample<S> samples[Room::kPerLane];
  S weights[Room::kPerLane];

  // A sample outside its map names the first row; what is read there is not used.
  template <typename Source>
  DETFAMILY_DEVICE void prepare(const Problem& problem, const Source& source, const typename Source::Row& row, int head,
                                const Own<S, G, Source>& own, int first, bool real, const Room& slots,
                                const Team<G>& team) {
    any = false;
#pragma unroll
    for (int k = 0; k < Room::kPerLane; ++k) {
      const int index = first + team.lane + k * G;
      const bool counts = real && index < problem.samples;
      const Level<S> level(problem, counts ? index : 0);
      const Place<S> place = source.place(row, own.raw[k], level.index, level.w, level.h);
      samples[k] = Sample<S>(problem, place, level.index, head, level.w, level.h);
      weights[k] = place.weight;
      Four<S> shares = samples[k].weights(place.weight);
#pragma unroll
      for (int c = 0; c < 4; ++c) shares.v[c] = counts ? shares.v[c] : S(0);
      slots.weights[team.lane + k * G] = shares;
      Four<unsigned> rows = samples[k].rows;
#pragma unroll
      for (int c = 0; c < 4; ++c) rows.v[c] = samples[k].inside() ? rows.v[c] : static_cast<unsigned>(head);
      slots.rows[team.lane + k * G] = rows;
      any = any || (counts && samples[k].inside());
    }
  }

  template <typename Source>
  DETFAMILY_DEVICE void finish(const Problem& problem, const Source& source, const typename Source::Row& row, int first,
                               bool real, const Room& slots, const Team<G>& team, Two<S>* kept_weights,
                               Two<S>* kept_places) const {
#pragma unroll
    for (int k = 0; k < Room::kPerLane; ++k) {
      const int index = first + team.lane + k * G;
      if (!real || index >= problem.samples) continue;
      const Level<S> level(problem, index);
      const PlaceGradient<S> grad = samples[k].gradient(weights[k], slots.dots[team.lane + k * G]);
      source.finish(row, index, level.index, weights[k], level.w, level.h, grad, kept_weights, kept_places);
    }
  }
};

template <typename T, int V, int G, bool EXACT, typename Source>
__global__ void __launch_bounds__(kThreads, EXACT ? 3 : 2)
    backward_kernel(const __grid_constant__ Problem problem, const T* __restrict__ grad_output,
                    const T* __restrict__ value, const __grid_constant__ Source source,
                    const __grid_constant__ ValueSums<typename SumOf<T>::type> value_sums,
                    Two<typename SumOf<T>::type>* kept_elsewhere) {
  using S = typename SumOf<T>::type;
  using Room = Slots<S, G, true>;
  constexpr int kAtOnce = 1;
  constexpr int kLeft = 4 * kAtOnce > G ? 4 * kAtOnce / G : 1;  // sums a lane is left with
  const Team<G> team;
  const Room slots(device::dynamic_shared(), team);
  const Pairs pairs(problem, blockIdx.x);
  const int width = EXACT ? V * G : problem.width;

  // What a pair keeps until all its samples are known; see Projected::finish.
  const int teams = blockDim.x / G;
  Two<S>* kept = reinterpret_cast<Two<S>*>(device::dynamic_shared() + blockDim.x / kWarp * Room::kBytes);
  if constexpr (V == 1) {
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    if (kept_elsewhere != nullptr) kept = kept_elsewhere + block * 2 * teams * problem.samples;
  }
  Two<S>* kept_weights = kept + threadIdx.x / G * problem.samples;
  Two<S>* kept_places = kept_weights + teams * problem.samples;

  S scale = S(1);
  bool summed = true;
  if constexpr (V == 1) {
    if (value_sums.fixed != nullptr) {
      const FixedPoint<S> fixed(value_sums);
      summed = fixed.finite;
      scale = summed ? fixed.scale() : S(0);
    }
  }

  for (int image = blockIdx.y; image < problem.batch; image += gridDim.y) {
    const int64_t image_offset = static_cast<int64_t>(image) * problem.tokens * problem.heads * width;
    const T* map = value + image_offset;
    const SumsOfImage<T, V, G, EXACT> sums(value_sums, image_offset, map);
    for (int begin = team.warp * Team<G>::kPairs; begin < pairs.count(); begin += teams) {
      const bool real = begin + team.group < pairs.count();
      const Pair pair = pairs[real ? begin + team.group : begin];
      const T* grad_row = grad_output + pair_index(problem, image, pair) * width;
      S grad[V] = {};
      if constexpr (EXACT) read_channels<T, V>(grad_row + team.lane * V, real, grad);
      const auto row =
          source.open(problem, pair_index(problem, image, pair), query_index(problem, image, pair), real, team);
      Own<S, G, Source> own;
      Prepared<S, G> prepared;
      for (int first = 0; first < problem.samples; first += Room::kCount) {
        own.fetch(problem, source, row, first, real, team.lane);
        prepared.prepare(problem, source, row, pair.head, own, first, real, slots, team);
        const int count = device::ballot(prepared.any) != 0 ? min(Room::kCount, problem.samples - first) : 0;
        device::warp_sync();
#pragma unroll 1
        for (int begun = 0; begun < count; begun += kAtOnce) {
          S dots[4 * kAtOnce] = {};
          for (int base = 0; base < width; base += V * G) {
            const int channel = base + team.lane * V;
            const bool covered = EXACT || channel < width;
            if constexpr (!EXACT) read_channels<T, V>(grad_row + channel, real && covered, grad);
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              const Four<unsigned> rows = slots.rows[begun + k];
              Channels<T, V> corners[4];
              const T* addresses[4];
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                addresses[c] = device::at_row(map + (covered ? channel : 0), rows.v[c], width);
                corners[c].load(addresses[c]);
              }
              const Four<S> weights = slots.weights[begun + k];
#pragma unroll
              for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int i = 0; i < V; ++i) {
                  if (covered) dots[4 * k + c] += grad[i] * corners[c][i];
                }
                // none for corners outside the map, and none for samples on a pixel's centre, as in a new model
                if (weights.v[c] != S(0) && covered && summed) {
                  sums.add(addresses[c], rows.v[c], width, channel, weights.v[c], scale, grad);
                }
              }
            }
          }
          exchange<4 * kAtOnce, G, 1>(dots, team.lane);
          if (team.lane < 4 * kAtOnce) {
            S* left = slots.dots[begun].v + exchanged<4 * kAtOnce, G>(team.lane);
#pragma unroll
            for (int i = 0; i < kLeft; ++i) left[i] = dots[i];
          }
        }
        device::warp_sync();
        prepared.finish(problem, source, row, first, real, slots, team, kept_weights, kept_places);
      }
      source.close(problem, row, pair_index(problem, image, pair), real, kept_weights, kept_places, team);
      device::warp_sync();  // before the next pair's are kept
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Small kernels around the backward one.

DETFAMILY_DEVICE int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
DETFAMILY_DEVICE int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Sums of 32 bits to values of 16; `lanes`: see SumsOfImage, 1 where channels lie in order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    narrow_kernel(const float* __restrict__ sums, T* __restrict__ grad, int64_t count, int lanes) {
  const int64_t eights = count / 8;
  for (int64_t i = global_thread(); i < eights; i += all_threads()) {
    const int64_t lane = i & (lanes - 1);
    Channels<float, 4> first, second;
    first.load(sums + (i - lane) * 8 + lane * 4);
    second.load(sums + (i - lane) * 8 + (lane + lanes) * 4);
    const float x[8] = {first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]};
    Channels<T, 8>::store(grad + i * 8, x);
  }
  for (int64_t i = eights * 8 + global_thread(); i < count; i += all_threads()) {
    write(grad + i, narrow<T>(read(sums + i)));
  }
}

// The largest magnitude, as bits: those of numbers without a sign are in the order of the numbers, infinity and NaN
// last.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    bound_kernel(const T* __restrict__ x, int64_t count, unsigned long long* __restrict__ bound) {
  using S = typename SumOf<T>::type;
  constexpr auto kMagnitude = static_cast<typename Format<S>::Bits>(-1) >> 1;
  unsigned long long most = 0;
  for (int64_t i = global_thread(); i < count; i += all_threads()) {
    const unsigned long long bits = device::bits(widen(read(x + i))) & kMagnitude;
    most = bits > most ? bits : most;
  }
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const unsigned long long other = device::shuffle_xor(most, lanes);
    most = other > most ? other : most;
  }
  if (threadIdx.x % kWarp == 0) device::raise(bound, most);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    resolve_kernel(const __grid_constant__ ValueSums<typename SumOf<T>::type> sums, T* __restrict__ grad,
                   int64_t count) {
  using S = typename SumOf<T>::type;
  const FixedPoint<S> fixed(sums);
  const S undefined = kInfinity<S> - kInfinity<S>;
  for (int64_t i = global_thread(); i < count; i += all_threads()) {
    write(grad + i, narrow<T>(fixed.finite ? fixed.value(device::load(sums.fixed + i)) : undefined));
  }
}

// (B * Q, M, parts) to (B * Q, parts), heads in order.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    sum_heads_kernel(const S* __restrict__ each, S* __restrict__ total, int64_t count, int heads, int parts) {
  for (int64_t i = global_thread(); i < count; i += all_threads()) {
    const S* address = each + i / parts * heads * parts + i % parts;
    S sum = S(0);
    for (int head = 0; head < heads; ++head) sum += read(address + static_cast<int64_t>(head) * parts);
    write(total + i, sum);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches. A Launcher runs kernels, one after another, and has memory for what lies between them:
//   launcher.run(kernel, Grid, arguments...), launcher.zero(address, bytes), launcher.scratch(bytes).

struct Grid {
  unsigned x, y, threads;
  size_t shared;
};

inline Grid elementwise(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return {static_cast<unsigned>(blocks < 1 ? 1 : blocks > 4096 ? 4096 : blocks), 1, kThreads, 0};
}

// Blocks of as many threads as shared memory allows; it need not suffice for one warp: Grid::shared says how much it
// takes.
template <typename T, int G, bool BACKWARD>
Grid pairs_grid(Problem& problem, size_t kept_per_pair) {
  using S = typename SumOf<T>::type;
  // small blocks spread few pairs over all processors
  unsigned threads = problem.tiled ? kThreads : kThreads / 2;
  const auto shared = [&] { return threads / kWarp * Slots<S, G, BACKWARD>::kBytes + threads / G * kept_per_pair; };
  while (threads > kWarp && shared() > kSharedLimit) threads /= 2;
  problem.pairs_per_block = threads / G;
  // heads that share lines of 128 bytes go together
  problem.heads_per_tile = problem.width * sizeof(T) <= 64 && problem.heads % 2 == 0 ? 2 : 1;
  const int tile_heads = problem.heads / problem.heads_per_tile;
  problem.by_tile_heads = Divider(tile_heads);
  const unsigned blocks = problem.tiled ? static_cast<unsigned>(problem.tiles) * tile_heads
                                        : ceil_divide(problem.pairs, problem.pairs_per_block);
  return {blocks, static_cast<unsigned>(problem.batch < 65535 ? problem.batch : 65535), threads, shared()};
}

// What fits: D known, 16 bytes a lane; else 16 bytes a lane; else one channel a lane.
enum class Path { kExact16, kExact32, kExact64, kWide, kScalar };

template <typename T>
Path choose_path(const Problem& problem) {
  constexpr int kVector = sizeof(T) == 8 ? 1 : 16 / static_cast<int>(sizeof(T));
  if (kVector == 1 || problem.width % kVector != 0) return Path::kScalar;
  switch (problem.width) {
    case 16: return Path::kExact16;
    case 32: return Path::kExact32;
    case 64: return Path::kExact64;
    default: return Path::kWide;
  }
}

template <typename T, int V, int G, bool EXACT, typename Source, typename Launcher>
void run_forward(Launcher& launcher, Problem problem, const T* value, const Source& source, T* output) {
  const Grid grid = pairs_grid<T, G, false>(problem, 0);
  launcher.run(forward_kernel<T, V, G, EXACT, Source>, grid, problem, value, source, output);
}

template <typename T, typename Source, typename Launcher>
void forward(Launcher& launcher, const Problem& problem, const T* value, const Source& source, T* output) {
  if (problem.batch == 0 || problem.pairs == 0) return;
  if constexpr (sizeof(T) < 8) {
    constexpr int V = 16 / sizeof(T);
    switch (choose_path<T>(problem)) {
      case Path::kExact16: return run_forward<T, V, 16 / V, true>(launcher, problem, value, source, output);
      case Path::kExact32: return run_forward<T, V, 32 / V, true>(launcher, problem, value, source, output);
      case Path::kExact64: return run_forward<T, V, 64 / V, true>(launcher, problem, value, source, output);
      case Path::kWide: return run_forward<T, V, 8, false>(launcher, problem, value, source, output);
      case Path::kScalar: break;
    }
  }
  run_forward<T, 1, kWarp, false>(launcher, problem, value, source, output);
}

// False where the samples of a pair do not fit shared memory, and this kernel keeps them nowhere else.
template <typename T, int V, int G, bool EXACT, typename Source, typename Launcher>
bool run_backward(Launcher& launcher, Problem problem, const T* grad_output, const T* value, const Source& source,
                  const ValueSums<typename SumOf<T>::type>& sums, bool references) {
  using S = typename SumOf<T>::type;
  const size_t kept = Source::kProjected ? (references ? 2 : 1) * problem.samples * sizeof(Two<S>) : 0;
  Grid grid = pairs_grid<T, G, true>(problem, kept);
  Two<S>* elsewhere = nullptr;
  if (grid.shared > kSharedLimit) {
    if (V > 1) return false;
    grid = pairs_grid<T, G, true>(problem, 0);
    const size_t pairs = static_cast<size_t>(grid.x) * grid.y * (grid.threads / G);
    elsewhere = static_cast<Two<S>*>(launcher.scratch(pairs * problem.samples * 2 * sizeof(Two<S>)));
  }
  launcher.run(backward_kernel<T, V, G, EXACT, Source>, grid, problem, grad_output, value, source, sums, elsewhere);
  return true;
}

template <auto N>
struct Number {
  static constexpr auto value = N;
};

// `lanes`: see narrow_kernel.
template <typename T, typename Source, typename Launcher>
void sum_gradients(Launcher& launcher, const Problem& problem, const T* grad_output, const T* value,
                   const Source& source, const ValueSums<typename SumOf<T>::type>& sums, bool references, int& lanes) {
  lanes = 1;
  const auto run = [&](auto v, auto g, auto exact) {
    return run_backward<T, decltype(v)::value, decltype(g)::value, decltype(exact)::value>(
        launcher, problem, grad_output, value, source, sums, references);
  };
  if constexpr (sizeof(T) < 8) {
    constexpr int V = 16 / sizeof(T);
    using Vector = Number<V>;
    // fixed point adds channel by channel
    const Path path = sums.fixed != nullptr ? Path::kScalar : choose_path<T>(problem);
    lanes = path == Path::kExact16 ? 16 / V : path == Path::kExact32 ? 32 / V : path == Path::kExact64 ? 64 / V : 1;
    if (path == Path::kExact16 && run(Vector{}, Number<16 / V>{}, Number<true>{})) return;
    if (path == Path::kExact32 && run(Vector{}, Number<32 / V>{}, Number<true>{})) return;
    if (path == Path::kExact64 && run(Vector{}, Number<64 / V>{}, Number<true>{})) return;
    lanes = 1;
    if (path == Path::kWide && run(Vector{}, Number<8>{}, Number<false>{})) return;
  }
  run(Number<1>{}, Number<kWarp>{}, Number<false>{});
}

// Nothing but sums that are added to is filled with zeros.
template <typename T, typename Source, typename Launcher>
void backward(Launcher& launcher, const Problem& problem, const T* grad_output, const T* value, Source source,
              T* grad_value, typename SumOf<T>::type* grad_references, bool deterministic) {
  using S = typename SumOf<T>::type;
  const int64_t count = static_cast<int64_t>(problem.batch) * problem.tokens * problem.heads * problem.width;
  if (problem.batch == 0 || problem.pairs == 0) return launcher.zero(grad_value, count * sizeof(T));
  const int64_t pairs = static_cast<int64_t>(problem.batch) * problem.pairs;
  const int64_t samples = pairs * problem.samples;

  ValueSums<S> sums{};
  if (deterministic) {
    // the two bounds lie behind the sums: one stretch of zeros
    long long* fixed = static_cast<long long*>(launcher.scratch((count + 2) * sizeof(long long)));
    unsigned long long* bounds = reinterpret_cast<unsigned long long*>(fixed + count);
    launcher.zero(fixed, (count + 2) * sizeof(long long));
    sums.fixed = fixed, sums.bounds = bounds, sums.softmax = Source::kProjected;
    while ((int64_t{1} << sums.count_bits) < static_cast<int64_t>(problem.queries) * problem.samples) ++sums.count_bits;
    launcher.run(bound_kernel<T>, elementwise(pairs * problem.width), grad_output, pairs * problem.width, bounds);
    if constexpr (!Source::kProjected) {
      launcher.run(bound_kernel<S>, elementwise(samples), source.weights, samples, bounds + 1);
    }
  } else {
    if constexpr (sizeof(T) == sizeof(S)) {
      sums.plain = grad_value;
    } else {
      sums.plain = static_cast<S*>(launcher.scratch(count * sizeof(S)));
    }
    launcher.zero(sums.plain, count * sizeof(S));
  }

  if constexpr (Source::kProjected) {
    if (grad_references != nullptr) {
      const int64_t each = pairs * problem.levels * source.reference_width;
      source.grad_references = static_cast<S*>(launcher.scratch(each * sizeof(S)));
    }
  }

  int lanes = 1;
  sum_gradients(launcher, problem, grad_output, value, source, sums, grad_references != nullptr, lanes);

  if (deterministic) {
    launcher.run(resolve_kernel<T>, elementwise(count), sums, grad_value, count);
  } else if constexpr (sizeof(T) != sizeof(S)) {
    launcher.run(narrow_kernel<T>, elementwise(count / 8 + 1), static_cast<const S*>(sums.plain), grad_value, count,
                 lanes);
  }
  if constexpr (Source::kProjected) {
    if (grad_references != nullptr) {
      const int parts = problem.levels * source.reference_width;
      const int64_t total = static_cast<int64_t>(problem.batch) * problem.queries * parts;
      launcher.run(sum_heads_kernel<S>, elementwise(total), static_cast<const S*>(source.grad_references),
                   grad_references, total, problem.heads, parts);
    }
  }
}

}  // namespace detfamily::cuda
