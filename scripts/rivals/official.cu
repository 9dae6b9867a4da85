// The official CUDA kernels, launched as their own host code does it, for a comparison of speed (official.py).
//
// Their host code no longer compiles; the header with the kernels does, beside empty files in the place of the headers
// that it includes and does not need.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "ms_deform_im2col_cuda.cuh"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

cudaStream_t current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  auto getter = library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  STD_TORCH_CHECK(getter, "this PyTorch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "no current stream");
  return static_cast<cudaStream_t>(stream);
}

struct Chunk {
  int images, tokens, heads, width, levels, queries, points;
  int64_t value, locations, weights, output;  // elements of one chunk
  int64_t count;
};

// Images go to the kernel im2col_step at a time.
Chunk chunk_of(const Tensor& value, const Tensor& locations, int64_t step) {
  const int64_t batch = value.size(0), images = std::min(batch, step);
  STD_TORCH_CHECK(images > 0 && batch % images == 0, "the batch must be a multiple of im2col_step");
  const int64_t queries = locations.size(1), heads = value.size(2), width = value.size(3), levels = locations.size(3),
                points = locations.size(4), tokens = value.size(1), samples = images * queries * heads * levels * points;
  return {static_cast<int>(images), static_cast<int>(tokens), static_cast<int>(heads), static_cast<int>(width),
          static_cast<int>(levels), static_cast<int>(queries), static_cast<int>(points),
          images * tokens * heads * width, 2 * samples, samples, images * queries * heads * width, batch / images};
}

template <typename T>
void forward_chunks(
    const Chunk& c, const Tensor& value, const Tensor& shapes, const Tensor& starts, const Tensor& locations,
    const Tensor& weights, Tensor& output) {
  for (int64_t i = 0; i < c.count; ++i) {
    ms_deformable_im2col_cuda<T>(
        current_stream(value.get_device_index()), value.const_data_ptr<T>() + i * c.value,
        shapes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>(),
        locations.const_data_ptr<T>() + i * c.locations, weights.const_data_ptr<T>() + i * c.weights, c.images,
        c.tokens, c.heads, c.width, c.levels, c.queries, c.points, output.mutable_data_ptr<T>() + i * c.output);
  }
}

template <typename T>
void backward_chunks(
    const Chunk& c, const Tensor& grad, const Tensor& value, const Tensor& shapes, const Tensor& starts,
    const Tensor& locations, const Tensor& weights, Tensor& grad_value, Tensor& grad_locations, Tensor& grad_weights) {
  for (int64_t i = 0; i < c.count; ++i) {
    ms_deformable_col2im_cuda<T>(
        current_stream(value.get_device_index()), grad.const_data_ptr<T>() + i * c.output,
        value.const_data_ptr<T>() + i * c.value, shapes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>(),
        locations.const_data_ptr<T>() + i * c.locations, weights.const_data_ptr<T>() + i * c.weights, c.images,
        c.tokens, c.heads, c.width, c.levels, c.queries, c.points, grad_value.mutable_data_ptr<T>() + i * c.value,
        grad_locations.mutable_data_ptr<T>() + i * c.locations, grad_weights.mutable_data_ptr<T>() + i * c.weights);
  }
}

Tensor forward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights, int64_t step) {
  const Chunk c = chunk_of(value, locations, step);
  Tensor output = torch::stable::new_zeros(value, {value.size(0), c.queries, c.heads * c.width});
  value.scalar_type() == ScalarType::Double ? forward_chunks<double>(c, value, shapes, starts, locations, weights, output)
                                            : forward_chunks<float>(c, value, shapes, starts, locations, weights, output);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights, Tensor grad, int64_t step) {
  const Chunk c = chunk_of(value, locations, step);
  const auto zeros = [](Tensor like) {
    like = torch::stable::empty_like(like);
    return torch::stable::zero_(like);
  };
  Tensor grad_value = zeros(value), grad_locations = zeros(locations), grad_weights = zeros(weights);
  const auto run = value.scalar_type() == ScalarType::Double ? backward_chunks<double> : backward_chunks<float>;
  run(c, grad, value, shapes, starts, locations, weights, grad_value, grad_locations, grad_weights);
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY(official_ms_deform_attn, m) {
  m.def(
      "forward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights, int step) -> Tensor");
  m.def(
      "backward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights, Tensor grad, int step) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(official_ms_deform_attn, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}
