// Sizes of a call, read from its tensors and checked: nothing beyond these files reads out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace detfamily {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Sizes {
  int64_t batch, tokens, heads, width, queries, levels, points;
  std::vector<int64_t> shapes;  // h0, w0, h1, w1, ...
};

inline std::string words(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ")";
  return text.str();
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  const auto actual = sizes_of(tensor);
  STD_TORCH_CHECK(actual == expected, name, " has shape ", words(actual), "; expected ", words(expected));
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == expected, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
      "; expected ", torch::headeronly::toString(expected));
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& value) {
  STD_TORCH_CHECK(
      tensor.device() == value.device(), name, " is not on the device of value: nothing is copied between devices");
}

// float64 computes in float64, everything else in float32.
inline ScalarType compute_type(const Tensor& value) {
  const ScalarType type = value.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
          type == ScalarType::BFloat16,
      "value has dtype ", torch::headeronly::toString(type), "; expected float64, float32, float16 or bfloat16");
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// places: sampling_locations or sampling_offsets, (B, Q, M, L, P, 2) both.
inline Sizes read_sizes(
    const Tensor& value, const std::vector<int64_t>& spatial_shapes, const char* places_name, const Tensor& places) {
  STD_TORCH_CHECK(value.dim() == 4, "value has shape ", words(sizes_of(value)), "; expected (B, S, M, D)");
  STD_TORCH_CHECK(
      places.dim() == 6, places_name, " has shape ", words(sizes_of(places)), "; expected (B, Q, M, L, P, 2)");
  STD_TORCH_CHECK(
      !spatial_shapes.empty() && spatial_shapes.size() % 2 == 0,
      "spatial_shapes has ", spatial_shapes.size(), " numbers; expected h, w of one level or more");
  Sizes sizes{value.size(0),  value.size(1), value.size(2), value.size(3), places.size(1),
              static_cast<int64_t>(spatial_shapes.size() / 2), places.size(4), spatial_shapes};
  int64_t cells = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    STD_TORCH_CHECK(
        spatial_shapes[i] >= 0 && spatial_shapes[i + 1] >= 0, "spatial_shapes holds a negative size");
    cells += spatial_shapes[i] * spatial_shapes[i + 1];
  }
  STD_TORCH_CHECK(
      cells == sizes.tokens && cells <= std::numeric_limits<int32_t>::max(),
      "value has shape ", words(sizes_of(value)), "; expected (B, S, M, D) with S = ", cells,
      ", the cells of spatial_shapes, fewer than 2^31");
  STD_TORCH_CHECK(
      sizes.points >= 1 && sizes.levels * sizes.points <= 4096, places_name, " has ", sizes.levels * sizes.points,
      " sampling points for each query and head; expected 1 to 4096");
  check_shape(places_name, places, {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2});
  return sizes;
}

// Sizes of a call in the plain form, all of its arguments checked.
inline Sizes plain_sizes(
    const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes sizes = read_sizes(value, shapes, "sampling_locations", locations);
  const ScalarType type = compute_type(value);
  check_device("sampling_locations", locations, value);
  check_device("attention_weights", weights, value);
  check_type("sampling_locations", locations, type);
  check_type("attention_weights", weights, type);
  check_shape("attention_weights", weights, {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points});
  return sizes;
}

// The same in the projected form; references are points or boxes, which their last size says.
inline Sizes projected_sizes(
    const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& references, const Tensor& offsets,
    const Tensor& logits) {
  const Sizes sizes = read_sizes(value, shapes, "sampling_offsets", offsets);
  const ScalarType type = compute_type(value);
  check_device("reference_points", references, value);
  check_device("sampling_offsets", offsets, value);
  check_device("attention_logits", logits, value);
  check_type("reference_points", references, type);
  check_type("sampling_offsets", offsets, offsets.scalar_type() == value.scalar_type() ? value.scalar_type() : type);
  check_type("attention_logits", logits, offsets.scalar_type());
  check_shape("attention_logits", logits, {sizes.batch, sizes.queries, sizes.heads, sizes.levels * sizes.points});
  const bool boxes = references.dim() == 4 && references.size(3) == 4;
  check_shape("reference_points", references, {sizes.batch, sizes.queries, sizes.levels, boxes ? 4 : 2});
  return sizes;
}

}  // namespace detfamily
