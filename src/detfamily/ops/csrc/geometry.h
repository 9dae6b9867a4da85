// Where a sample lies in a map, and how its four corners share it: the arithmetic of every backend, CPU and CUDA.
//
// Pixel (i, j) has its centre at ((j + 0.5) / w, (i + 0.5) / h); what lies outside a map counts as zero. A sample counts
// while -1 < x < w and -1 < y < h: beyond, none of its corners is in the map.
#pragma once

#if defined(__CUDACC__)
#define DETFAMILY_INLINE __host__ __device__ __forceinline__
#else
#define DETFAMILY_INLINE inline __attribute__((always_inline))
#endif

namespace detfamily {

// A sample's place along one axis: between cell `low` (-1: left of the map) and the next.
template <typename T>
struct Axis {
  int low;
  T fraction;   // of the way from low to low + 1
  bool inside;  // false for NaN, too
};

// Normalised coordinate to cells, counted from the centre of the first.
template <typename T>
DETFAMILY_INLINE T to_cells(T location, T size) {
  return location * size - T(0.5);
}

// The same for an offset in cells around a reference point ...
template <typename T>
DETFAMILY_INLINE T around_point(T reference, T offset, T size) {
  return reference * size + offset - T(0.5);
}

// ... and for an offset in half extents per sampling point around the centre of a reference box.
template <typename T>
DETFAMILY_INLINE T around_box(T center, T extent, T offset, T half_step, T size) {
  return to_cells(center + offset * extent * half_step, size);  // half_step = 0.5 / points
}

// Truncating a shifted, non-negative number is its floor, on every processor, without a call.
template <typename T>
DETFAMILY_INLINE Axis<T> split(T cells, T size) {
  Axis<T> axis;
  axis.inside = cells > T(-1) && cells < size;
  const T shifted = axis.inside ? cells + T(1) : T(0);
  const int low = static_cast<int>(shifted) - 1;
  axis.low = low;
  axis.fraction = axis.inside ? cells - static_cast<T>(low) : T(0);
  return axis;
}

}  // namespace detfamily
