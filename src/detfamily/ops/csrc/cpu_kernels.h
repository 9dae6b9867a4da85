// What cpu.cpp and the kernels, compiled once for each instruction set, say to each other. No templates of the standard
// library here: the linker could keep a copy of them that was compiled for a newer processor than the user's.
#pragma once

#include <cstdint>

namespace detfamily {

enum class Form { plain, point, box };  // locations and weights, or raw projections around points or around boxes

// Level constants, repeated for each of the L * P points of a query, so that loops over points are plain.
template <typename T>
struct Points {
  int count;         // L * P
  int per_level;     // P
  T half_step;       // 0.5 / P
  const T* width;    // of the point's level, in cells
  const T* height;
  const int32_t* columns;  // the same as integers
  const int32_t* rows;
  const int32_t* start;  // first cell of the level
};

// One image and head. Strides count elements, between one cell, query or level and the next.
template <typename T>
struct Slice {
  const T* value;
  int64_t value_stride;
  int width;  // channels D
  const T* places;  // locations (plain) or offsets: 2 * L * P numbers for each query
  const T* scores;  // weights (plain) or logits: L * P for each query
  int64_t places_stride, scores_stride;
  const T* references;  // (Q, L, 2 or 4); not read by the plain form
  int64_t references_stride;
};

template <typename T>
struct Gradients {
  const T* output;
  int64_t output_stride;
  T* value;  // zeroed by the caller
  int64_t value_stride;
  T* places;  // strides as in Slice
  T* scores;
  T* references;  // (Q, L, 2 or 4): this head's share; null where nobody asks
  int64_t references_stride;
};

// `scratch` holds scratch_size(L * P) elements.
template <typename T>
struct Kernels {
  void (*forward)(
      Form, const Points<T>&, const Slice<T>&, int64_t first, int64_t last, T* output, int64_t output_stride, T* scratch);
  void (*backward)(
      Form, const Points<T>&, const Slice<T>&, int64_t first, int64_t last, const Gradients<T>&, T* scratch);
};

constexpr int64_t scratch_size(int64_t points) { return 16 * ((points + 15) / 16 * 16); }

struct InstructionSet {
  const char* name;
  Kernels<float> single_precision;
  Kernels<double> double_precision;
};

extern const InstructionSet baseline, avx2, avx512;

}  // namespace detfamily
