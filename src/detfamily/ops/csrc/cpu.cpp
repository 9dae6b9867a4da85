// The op on the CPU: arguments, memory, threads and the choice of the instruction set. The arithmetic is in cpu_kernels.
//
// A thread owns whole (image, head) slices in the backward pass, so nothing is added to by two of them: results do not
// depend on the number of threads, and two runs agree bit for bit.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <tuple>

#include "arguments.h"
#include "cpu_kernels.h"

namespace detfamily {
namespace {

constexpr int64_t queries_per_task = 64;

// The widest that this processor has; DETFAMILY_CPU_ISA asks for a narrower one.
const InstructionSet* find_instruction_set() {
  std::vector<const InstructionSet*> available = {&baseline};
#if !defined(DETFAMILY_ONLY_BASELINE)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    available.push_back(&avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      available.push_back(&avx512);
    }
  }
#endif
  const char* wish = std::getenv("DETFAMILY_CPU_ISA");
  if (!wish || !*wish) return available.back();
  for (const InstructionSet* one : available) {
    if (!std::strcmp(one->name, wish)) return one;
  }
  return nullptr;
}

const InstructionSet& instruction_set() {
  static const InstructionSet* chosen = find_instruction_set();
  STD_TORCH_CHECK(
      chosen, "DETFAMILY_CPU_ISA names no instruction set that this processor has; expected baseline, avx2 or avx512");
  return *chosen;
}

template <typename T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return instruction_set().single_precision;
}
template <>
const Kernels<double>& kernels<double>() {
  return instruction_set().double_precision;
}

// The tensors of a call in the type that is computed in, contiguous; references are undefined in the plain form.
struct Inputs {
  Form form;
  Sizes sizes;
  ScalarType type;
  Tensor value, places, scores, references;
};

Tensor prepared(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

Inputs plain_inputs(
    const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes sizes = plain_sizes(value, shapes, locations, weights);
  const ScalarType type = compute_type(value);
  return {Form::plain, sizes, type, prepared(value, type), prepared(locations, type), prepared(weights, type), Tensor()};
}

Inputs projected_inputs(
    const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& references, const Tensor& offsets,
    const Tensor& logits) {
  const Sizes sizes = projected_sizes(value, shapes, references, offsets, logits);
  const ScalarType type = compute_type(value);
  const Form form = references.size(3) == 4 ? Form::box : Form::point;
  return {form, sizes, type, prepared(value, type), prepared(offsets, type), prepared(logits, type),
          prepared(references, type)};
}

// Level constants for each point, and the memory that holds them.
template <typename T>
struct PointTable {
  std::vector<T> extents;
  std::vector<int32_t> cells;
  Points<T> points;

  explicit PointTable(const Sizes& sizes) {
    const int64_t count = sizes.levels * sizes.points;
    extents.resize(2 * count);
    cells.resize(3 * count);
    int64_t start = 0;
    for (int64_t level = 0; level < sizes.levels; ++level) {
      const int64_t h = sizes.shapes[2 * level], w = sizes.shapes[2 * level + 1];
      for (int64_t i = level * sizes.points; i < (level + 1) * sizes.points; ++i) {
        extents[i] = static_cast<T>(w);
        extents[count + i] = static_cast<T>(h);
        cells[i] = static_cast<int32_t>(w);
        cells[count + i] = static_cast<int32_t>(h);
        cells[2 * count + i] = static_cast<int32_t>(start);
      }
      start += h * w;
    }
    points = {static_cast<int>(count),
              static_cast<int>(sizes.points),
              T(0.5) / static_cast<T>(sizes.points),
              extents.data(),
              extents.data() + count,
              cells.data(),
              cells.data() + count,
              cells.data() + 2 * count};
  }
};

// A map that is read often is gathered from faster when a head's cells lie side by side.
bool worth_packing(const Sizes& sizes) {
  return sizes.heads > 1 && sizes.queries * sizes.levels * sizes.points >= 4 * sizes.tokens;
}

template <typename T>
void copy_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * from_stride, width, to + i * to_stride);
}

template <typename T>
Slice<T> slice_of(const Inputs& in, int64_t b, int64_t m) {
  const Sizes& s = in.sizes;
  const int64_t count = s.levels * s.points, head = (b * s.queries * s.heads + m) * count;
  const int64_t dim = in.form == Form::plain ? 0 : in.references.size(3);
  return {in.value.template const_data_ptr<T>() + (b * s.tokens * s.heads + m) * s.width,
          s.heads * s.width,
          static_cast<int>(s.width),
          in.places.template const_data_ptr<T>() + 2 * head,
          in.scores.template const_data_ptr<T>() + head,
          2 * s.heads * count,
          s.heads * count,
          dim ? in.references.template const_data_ptr<T>() + b * s.queries * s.levels * dim : nullptr,
          s.levels * dim};
}

template <typename T>
void forward(const Inputs& in, const Tensor& output) {
  const Sizes& s = in.sizes;
  const PointTable<T> table(s);
  const int64_t slices = s.batch * s.heads;
  Tensor packed;
  if (worth_packing(s)) {
    packed = torch::stable::new_empty(in.value, {slices, s.tokens, s.width});
    torch::stable::parallel_for(0, slices, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Slice<T> slice = slice_of<T>(in, i / s.heads, i % s.heads);
        T* to = packed.template mutable_data_ptr<T>() + i * s.tokens * s.width;
        copy_rows(slice.value, slice.value_stride, to, s.width, s.tokens, s.width);
      }
    });
  }
  const int64_t blocks = (s.queries + queries_per_task - 1) / queries_per_task;
  torch::stable::parallel_for(0, slices * blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<T> scratch(scratch_size(table.points.count));
    for (int64_t task = first; task < last; ++task) {
      const int64_t i = task / blocks, begin = task % blocks * queries_per_task;
      const int64_t b = i / s.heads, m = i % s.heads;
      Slice<T> slice = slice_of<T>(in, b, m);
      if (packed.defined()) {
        slice.value = packed.template const_data_ptr<T>() + i * s.tokens * s.width;
        slice.value_stride = s.width;
      }
      T* to = output.template mutable_data_ptr<T>() + (b * s.queries * s.heads + m) * s.width;
      kernels<T>().forward(
          in.form, table.points, slice, begin, std::min(begin + queries_per_task, s.queries), to, s.heads * s.width,
          scratch.data());
    }
  });
}

struct Grads {
  Tensor value, places, scores;
  Tensor references;  // (M, B, Q, L, R), a share for each head; undefined where nobody asks
};

template <typename T>
void backward(const Inputs& in, const Tensor& grad_output, const Grads& grads) {
  const Sizes& s = in.sizes;
  const PointTable<T> table(s);
  const bool pack = worth_packing(s);
  const int64_t slice_size = s.tokens * s.width, count = table.points.count;
  torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t first, int64_t last) {
    std::vector<T> scratch(scratch_size(count)), packed(pack ? 2 * slice_size : 0);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / s.heads, m = i % s.heads, row = (b * s.queries * s.heads + m);
      Slice<T> slice = slice_of<T>(in, b, m);
      T* grad_value = grads.value.template mutable_data_ptr<T>() + (b * s.tokens * s.heads + m) * s.width;
      Gradients<T> gradients = {grad_output.template const_data_ptr<T>() + row * s.width,
                                s.heads * s.width,
                                grad_value,
                                s.heads * s.width,
                                grads.places.template mutable_data_ptr<T>() + 2 * row * count,
                                grads.scores.template mutable_data_ptr<T>() + row * count,
                                nullptr,
                                0};
      if (grads.references.defined()) {
        const int64_t stride = s.levels * in.references.size(3);
        gradients.references =
            grads.references.template mutable_data_ptr<T>() + (m * s.batch + b) * s.queries * stride;
        gradients.references_stride = stride;
      }
      if (pack) {
        copy_rows(slice.value, slice.value_stride, packed.data(), s.width, s.tokens, s.width);
        std::fill_n(packed.data() + slice_size, slice_size, T(0));
        slice.value = packed.data();
        gradients.value = packed.data() + slice_size;
        slice.value_stride = gradients.value_stride = s.width;
      } else {
        for (int64_t t = 0; t < s.tokens; ++t) std::fill_n(grad_value + t * s.heads * s.width, s.width, T(0));
      }
      kernels<T>().backward(in.form, table.points, slice, 0, s.queries, gradients, scratch.data());
      if (pack) copy_rows<T>(packed.data() + slice_size, s.width, grad_value, s.heads * s.width, s.tokens, s.width);
    }
  });
}

Tensor run_forward(const Inputs& in, ScalarType result) {
  const Sizes& s = in.sizes;
  Tensor output = torch::stable::new_empty(in.value, {s.batch, s.queries, s.heads * s.width});
  in.type == ScalarType::Double ? forward<double>(in, output) : forward<float>(in, output);
  return result == in.type ? output : torch::stable::to(output, result);
}

Grads run_backward(const Inputs& in, const Tensor& grad_output, const Tensor& value, bool reference_grad) {
  const Sizes& s = in.sizes;
  check_device("grad_output", grad_output, value);
  check_shape("grad_output", grad_output, {s.batch, s.queries, s.heads * s.width});
  const Tensor grad = prepared(grad_output, in.type);
  Grads grads = {torch::stable::empty_like(in.value), torch::stable::empty_like(in.places),
                 torch::stable::empty_like(in.scores), Tensor()};
  if (reference_grad) {
    grads.references =
        torch::stable::new_empty(in.value, {s.heads, s.batch, s.queries, s.levels, in.references.size(3)});
  }
  in.type == ScalarType::Double ? backward<double>(in, grad, grads) : backward<float>(in, grad, grads);
  return grads;
}

Tensor as(const Tensor& tensor, const Tensor& like) {
  return tensor.scalar_type() == like.scalar_type() ? tensor : torch::stable::to(tensor, like.scalar_type());
}

Tensor ms_deform_attn(Tensor value, std::vector<int64_t> shapes, Tensor locations, Tensor weights) {
  return run_forward(plain_inputs(value, shapes, locations, weights), value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    Tensor grad_output, Tensor value, std::vector<int64_t> shapes, Tensor locations, Tensor weights,
    bool /*deterministic: always*/) {
  const Grads grads = run_backward(plain_inputs(value, shapes, locations, weights), grad_output, value, false);
  return {as(grads.value, value), grads.places, grads.scores};
}

Tensor ms_deform_attn_projected(
    Tensor value, std::vector<int64_t> shapes, Tensor references, Tensor offsets, Tensor logits) {
  return run_forward(projected_inputs(value, shapes, references, offsets, logits), value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_projected_backward(
    Tensor grad_output, Tensor value, std::vector<int64_t> shapes, Tensor references, Tensor offsets, Tensor logits,
    bool /*deterministic: always*/, bool reference_grad) {
  const Inputs in = projected_inputs(value, shapes, references, offsets, logits);
  const Grads grads = run_backward(in, grad_output, value, reference_grad);
  const std::vector<int64_t> heads = {0};
  const Tensor grad_references = reference_grad ? torch::stable::sum(grads.references, heads)
                                                : torch::stable::new_empty(references, {0});
  return {as(grads.value, value), grad_references, as(grads.places, offsets), as(grads.scores, logits)};
}

}  // namespace
}  // namespace detfamily

// For people who ask which code runs.
extern "C" __attribute__((visibility("default"))) const char* detfamily_cpu_isa() {
  const detfamily::InstructionSet* chosen = detfamily::find_instruction_set();
  return chosen ? chosen->name : "none";
}

STABLE_TORCH_LIBRARY_IMPL(detfamily, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&detfamily::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&detfamily::ms_deform_attn_backward));
  m.impl("ms_deform_attn_projected", TORCH_BOX(&detfamily::ms_deform_attn_projected));
  m.impl("ms_deform_attn_projected_backward", TORCH_BOX(&detfamily::ms_deform_attn_projected_backward));
}
