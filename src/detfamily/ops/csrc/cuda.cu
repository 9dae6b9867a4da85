// The op on NVIDIA GPUs: arguments, memory, device and stream. The arithmetic is in cuda_kernels.cuh.
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "cuda_kernels.cuh"

namespace detfamily {
namespace {

void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "detfamily could not ", what, ": ", cudaGetErrorString(error));
}

// Torch's stream, asked for when it is needed: on a torch without CUDA this library still loads.
cudaStream_t current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Function>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "torch gives no CUDA stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Runs what cuda_kernels.cuh asks for, on the device and the stream of a tensor.
class Launcher {
 public:
  explicit Launcher(const Tensor& value)
      : value_(value), guard_(value.get_device_index()), stream_(current_stream(value.get_device_index())) {
    // this library has its own CUDA runtime, which has its own idea of the current device
    check_cuda(cudaSetDevice(value.get_device_index()), "select the device of value");
  }

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), const cuda::Grid& grid, const Arguments&... arguments) {
    kernel<<<dim3(grid.x, grid.y), grid.threads, grid.shared, stream_>>>(arguments...);
    check_cuda(cudaGetLastError(), "launch a kernel");
  }
  void zero(void* address, size_t bytes) {
    if (bytes != 0) check_cuda(cudaMemsetAsync(address, 0, bytes, stream_), "fill memory with zeros");
  }
  void* scratch(size_t bytes) {
    kept_.push_back(torch::stable::new_empty(value_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return kept_.back().mutable_data_ptr();
  }

 private:
  const Tensor& value_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  std::vector<Tensor> kept_;
};

// Contiguous, and where 16 bytes can be read at once.
Tensor prepared(const Tensor& tensor) {
  const Tensor whole = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : torch::stable::clone(whole);
}

struct Inputs {
  Sizes sizes;
  ScalarType type;  // of all arithmetic
  Tensor value, places, weights, references;  // references are undefined in the plain form
};

void check_limits(const Sizes& sizes) {
  STD_TORCH_CHECK(
      sizes.levels <= cuda::kMaxLevels, "spatial_shapes has ", sizes.levels, " levels; the CUDA kernels take up to ",
      cuda::kMaxLevels);
  constexpr int64_t kLimit = int64_t{1} << 30;
  STD_TORCH_CHECK(
      sizes.tokens * sizes.heads < kLimit && sizes.queries * sizes.heads < kLimit && sizes.batch < kLimit &&
          sizes.width < kLimit / 8,
      "value has shape ", words({sizes.batch, sizes.tokens, sizes.heads, sizes.width}), " for ", sizes.queries,
      " queries; the CUDA kernels take fewer than 2^30 tokens times heads, or queries times heads, and 2^27 channels");
}

Inputs plain_inputs(
    const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes sizes = plain_sizes(value, shapes, locations, weights);
  check_limits(sizes);
  return {sizes, compute_type(value), prepared(value), prepared(locations), prepared(weights), Tensor()};
}

Inputs projected_inputs(
    const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& references, const Tensor& offsets,
    const Tensor& logits) {
  const Sizes sizes = projected_sizes(value, shapes, references, offsets, logits);
  check_limits(sizes);
  return {sizes, compute_type(value), prepared(value), prepared(offsets), prepared(logits), prepared(references)};
}

cuda::Problem problem_of(const Sizes& sizes) {
  return cuda::make_problem(
      static_cast<int>(sizes.batch), static_cast<int>(sizes.queries), static_cast<int>(sizes.heads),
      static_cast<int>(sizes.width), static_cast<int>(sizes.levels), static_cast<int>(sizes.points),
      sizes.shapes.data());
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

struct Gradients {
  Tensor value, places, weights, references;  // references are undefined where nobody asks
};

// Calls `with` a source of samples, whose type says the form.
template <typename T, typename With>
void with_source(const Inputs& in, const Gradients& grads, const With& with) {
  using S = typename cuda::SumOf<T>::type;
  if (!in.references.defined()) {
    with(cuda::Plain<T>{data<S>(in.places), data<S>(in.weights), mutable_data<S>(grads.places),
                        mutable_data<S>(grads.weights)});
    return;
  }
  cuda::Projected<T> source{};
  source.references = data<S>(in.references);
  source.reference_width = static_cast<int>(in.references.size(3));
  source.half_step = S(0.5) / static_cast<S>(in.sizes.points);
  source.narrow_inputs = in.places.scalar_type() != in.type;
  source.offsets = data<void>(in.places);
  source.logits = data<void>(in.weights);
  source.grad_offsets = mutable_data<void>(grads.places);
  source.grad_logits = mutable_data<void>(grads.weights);
  with(source);
}

// Calls `with` a number of the type that the values have.
template <typename With>
void with_type(ScalarType type, const With& with) {
  switch (type) {
    case ScalarType::Double: return with(double{});
    case ScalarType::Float: return with(float{});
    case ScalarType::Half: return with(cuda::Half{});
    default: return with(cuda::BFloat16{});
  }
}

Tensor run_forward(const Inputs& in) {
  const Sizes& s = in.sizes;
  Tensor output = torch::stable::new_empty(in.value, {s.batch, s.queries, s.heads * s.width});
  if (output.numel() == 0) return output;
  Launcher launcher(in.value);
  with_type(in.value.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    with_source<T>(in, {}, [&](const auto& source) {
      cuda::forward<T>(launcher, problem_of(s), data<T>(in.value), source, mutable_data<T>(output));
    });
  });
  return output;
}

Gradients run_backward(const Inputs& in, const Tensor& grad_output, bool deterministic, bool reference_grad) {
  const Sizes& s = in.sizes;
  check_device("grad_output", grad_output, in.value);
  check_type("grad_output", grad_output, in.value.scalar_type());
  check_shape("grad_output", grad_output, {s.batch, s.queries, s.heads * s.width});
  const Tensor grad = prepared(grad_output);
  const Gradients grads = {torch::stable::empty_like(in.value), torch::stable::empty_like(in.places),
                           torch::stable::empty_like(in.weights),
                           reference_grad ? torch::stable::empty_like(in.references) : Tensor()};
  if (s.batch == 0) return grads;
  Launcher launcher(in.value);
  // of no head at all, references have no gradient, but the sums over heads are not run
  if (s.heads == 0 && reference_grad) {
    launcher.zero(grads.references.mutable_data_ptr(), grads.references.numel() * grads.references.element_size());
  }
  with_type(in.value.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using S = typename cuda::SumOf<T>::type;
    with_source<T>(in, grads, [&](const auto& source) {
      cuda::backward<T>(launcher, problem_of(s), data<T>(grad), data<T>(in.value), source, mutable_data<T>(grads.value),
                        mutable_data<S>(grads.references), deterministic);
    });
  });
  return grads;
}

Tensor ms_deform_attn(Tensor value, std::vector<int64_t> shapes, Tensor locations, Tensor weights) {
  return run_forward(plain_inputs(value, shapes, locations, weights));
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    Tensor grad_output, Tensor value, std::vector<int64_t> shapes, Tensor locations, Tensor weights,
    bool deterministic) {
  const Gradients grads =
      run_backward(plain_inputs(value, shapes, locations, weights), grad_output, deterministic, false);
  return {grads.value, grads.places, grads.weights};
}

Tensor ms_deform_attn_projected(
    Tensor value, std::vector<int64_t> shapes, Tensor references, Tensor offsets, Tensor logits) {
  return run_forward(projected_inputs(value, shapes, references, offsets, logits));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_projected_backward(
    Tensor grad_output, Tensor value, std::vector<int64_t> shapes, Tensor references, Tensor offsets, Tensor logits,
    bool deterministic, bool reference_grad) {
  const Inputs in = projected_inputs(value, shapes, references, offsets, logits);
  const Gradients grads = run_backward(in, grad_output, deterministic, reference_grad);
  const Tensor nothing = reference_grad ? grads.references : torch::stable::new_empty(references, {0});
  return {grads.value, nothing, grads.places, grads.weights};
}

}  // namespace
}  // namespace detfamily

STABLE_TORCH_LIBRARY_IMPL(detfamily, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&detfamily::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&detfamily::ms_deform_attn_backward));
  m.impl("ms_deform_attn_projected", TORCH_BOX(&detfamily::ms_deform_attn_projected));
  m.impl("ms_deform_attn_projected_backward", TORCH_BOX(&detfamily::ms_deform_attn_projected_backward));
}
