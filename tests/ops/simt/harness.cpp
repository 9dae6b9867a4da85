// The CUDA kernels in the emulator, as a library for ctypes.
#define DETFAMILY_SIMT_EMULATOR
#include "cuda_kernels.cuh"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace {

using namespace detfamily::cuda;

struct Launcher {
  simt::Machine& machine;

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
    machine.launch({grid.x, grid.y, 1}, grid.threads, grid.shared, [&] { kernel(arguments...); });
  }
  void zero(void* address, size_t bytes) {
    if (bytes != 0) std::memset(address, 0, bytes);
  }
  void* scratch(size_t bytes) { return machine.memory(bytes); }
};

}  // namespace

extern "C" {

// Everything a call takes and gives; null where a call has no such tensor.
struct Call {
  int64_t batch, queries, heads, width, levels, points, reference_width;
  const int64_t* height_width;
  int64_t narrow_inputs, deterministic;
  uint64_t seed;
  const void *value, *grad_output;
  const void *places, *weights, *references;  // locations and weights, or offsets, logits and references
  void *output, *grad_value, *grad_places, *grad_weights, *grad_references;
};
}

namespace {

struct Result {
  void* destination;
  void* memory;
  size_t bytes;
};

class Session {
 public:
  explicit Session(const Call& call) : call_(call) {
    machine_.random.seed(call.seed);
    simt::Machine::active() = &machine_;
  }

  template <typename T>
  const T* input(const void* source, int64_t count) {
    return machine_.input(static_cast<const T*>(source), count);
  }
  template <typename T>
  T* result(void* destination, int64_t count) {
    if (destination == nullptr) return nullptr;
    results_.push_back({destination, machine_.memory(count * sizeof(T)), count * sizeof(T)});
    return static_cast<T*>(results_.back().memory);
  }

  template <typename T>
  void run() {
    using S = typename SumOf<T>::type;
    const Problem problem = make_problem(call_.batch, call_.queries, call_.heads, call_.width, call_.levels,
                                         call_.points, call_.height_width);
    const int64_t pairs = call_.batch * call_.queries * call_.heads, samples = pairs * problem.samples;
    const int64_t values = call_.batch * problem.tokens * call_.heads * call_.width;
    const T* value = input<T>(call_.value, values);
    const T* grad_output = call_.grad_output ? input<T>(call_.grad_output, pairs * call_.width) : nullptr;
    T* output = result<T>(call_.output, pairs * call_.width);
    T* grad_value = result<T>(call_.grad_value, values);
    Launcher launcher{machine_};
    const auto both = [&](auto source, S* grad_references) {
      if (output != nullptr) return forward<T>(launcher, problem, value, source, output);
      backward<T>(launcher, problem, grad_output, value, source, grad_value, grad_references, call_.deterministic != 0);
    };
    if (call_.references == nullptr) {
      both(Plain<T>{input<S>(call_.places, 2 * samples), input<S>(call_.weights, samples),
                    result<S>(call_.grad_places, 2 * samples), result<S>(call_.grad_weights, samples)},
           nullptr);
    } else {
      const int64_t parts = call_.batch * call_.queries * call_.levels * call_.reference_width;
      Projected<T> source{};
      source.references = input<S>(call_.references, parts);
      source.reference_width = static_cast<int>(call_.reference_width);
      source.half_step = S(0.5) / S(call_.points);
      source.narrow_inputs = call_.narrow_inputs != 0;
      const auto raw = [&](const void* from, int64_t count) -> const void* {
        return source.narrow_inputs ? static_cast<const void*>(input<T>(from, count)) : input<S>(from, count);
      };
      const auto grad = [&](void* to, int64_t count) -> void* {
        return source.narrow_inputs ? static_cast<void*>(result<T>(to, count)) : result<S>(to, count);
      };
      source.offsets = raw(call_.places, 2 * samples);
      source.logits = raw(call_.weights, samples);
      source.grad_offsets = grad(call_.grad_places, 2 * samples);
      source.grad_logits = grad(call_.grad_weights, samples);
      both(source, result<S>(call_.grad_references, parts));
    }
    finish();
  }

 private:
  void finish() {
    machine_.check_intact();
    for (const Result& result : results_) std::memcpy(result.destination, result.memory, result.bytes);
  }

  const Call& call_;
  simt::Machine machine_;
  std::vector<Result> results_;
};

}  // namespace

// Runs a forward (with `output`) or a backward call; type: 0 float64, 1 float32, 2 float16, 3 bfloat16. Returns null,
// or what went wrong.
extern "C" const char* run(const Call* call, int type) {
  static std::string error;
  try {
    Session session(*call);
    if (type == 0) session.run<double>();
    if (type == 1) session.run<float>();
    if (type == 2) session.run<Half>();
    if (type == 3) session.run<BFloat16>();
    return nullptr;
  } catch (const simt::Failure& failure) {
    error = failure.what;
    return error.c_str();
  }
}

// Division as the kernels do it.
extern "C" unsigned divide(unsigned number, unsigned by) { return Divider(by)(number); }

// Kernels with one fault each, to see that it is found.
namespace {

enum Fault { kNone, kReadsBehind, kWritesInput, kMisaligned, kLeaves, kMeetsElsewhere, kSkipsSync, kBypasses };

void faulty_kernel(int fault, const float* input, float* output) {
  const int lane = static_cast<int>(threadIdx.x);
  float* shared = reinterpret_cast<float*>(device::dynamic_shared());
  shared[lane] = device::load(input + lane + (fault == kReadsBehind ? 1 : 0));
  if (fault == kWritesInput) device::store(const_cast<float*>(input) + lane, 0.0f);
  if (fault == kMisaligned) device::load(reinterpret_cast<const float4*>(input + 1));
  if (fault == kLeaves && lane == 5) return;
  if (fault == kMeetsElsewhere && lane == 5) device::ballot(true);
  if (fault == kBypasses && lane == 0) output[32] = 0.0f;
  if (fault != kSkipsSync) device::warp_sync();
  device::store(output + lane, shared[31 - lane]);
}

}  // namespace

// 32 numbers in, the same in reverse out; null, or what went wrong.
extern "C" const char* run_faulty(int fault, const float* numbers, float* reversed) {
  static std::string error;
  simt::Machine machine;
  simt::Machine::active() = &machine;
  try {
    const float* input = machine.input(numbers, 32);
    float* output = static_cast<float*>(machine.memory(32 * sizeof(float)));
    machine.launch({1, 1, 1}, 32, 32 * sizeof(float), [&] { faulty_kernel(fault, input, output); });
    machine.check_intact();
    std::memcpy(reversed, output, 32 * sizeof(float));
    return nullptr;
  } catch (const simt::Failure& failure) {
    error = failure.what;
    return error.c_str();
  }
}
