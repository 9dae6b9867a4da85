// Runs CUDA kernels on the CPU, one fiber per thread of a block, so that their indexing, exchanges and memory accesses
// can be checked where there is no GPU. It knows what cuda_kernels.cuh uses, no more.
//
// Threads of a block run one after another, in an order drawn from a seed, each until it has to wait. A thread waits in
// whatever involves other lanes of its warp; a lane that does not come, or comes to another operation, is an error.
// Global memory is read and written through functions that know every buffer: an access outside of one, of the wrong
// alignment, or a write to an input, is an error. Shared memory is full of NaN when a block starts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define DETFAMILY_DEVICE inline

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace simt {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Failure {
  std::string what;
};

// A buffer of global memory between two guarded stretches, which nobody may touch.
class Buffer {
 public:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kPoison = 0xff;  // NaN in every format

  Buffer(size_t bytes, bool writable) : bytes_(bytes), writable_(writable), memory_(bytes + 2 * kGuard + 16, kPoison) {
    const auto start = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
    begin_ = reinterpret_cast<char*>((start + 15) / 16 * 16);
  }
  Buffer(const void* source, size_t bytes) : Buffer(bytes, false) {
    if (bytes != 0) std::memcpy(begin_, source, bytes);
    original_.assign(begin_, begin_ + bytes);
  }

  char* data() const { return begin_; }
  size_t bytes() const { return bytes_; }
  bool writable() const { return writable_; }
  bool holds(const char* address, size_t bytes) const {
    return address >= begin_ && address + bytes <= begin_ + bytes_;
  }
  bool intact() const {
    const auto poisoned = [](unsigned char byte) { return byte == kPoison; };
    const auto* begin = reinterpret_cast<const unsigned char*>(begin_);
    const bool guards = std::all_of(memory_.data(), begin, poisoned) &&
                        std::all_of(begin + bytes_, memory_.data() + memory_.size(), poisoned);
    return guards && (writable_ || std::equal(original_.begin(), original_.end(), begin_));
  }

 private:
  size_t bytes_;
  bool writable_;
  std::vector<unsigned char> memory_;
  std::vector<char> original_;
  char* begin_;
};

enum class Operation { kNone, kShuffle, kBallot, kSync };

struct Thread {
  std::unique_ptr<char[]> stack;
  jmp_buf place;  // where it waits
  bool started = false;
  Index index;
  bool finished = false;
  Operation waiting = Operation::kNone;
  uint64_t given = 0;    // to the other lanes
  int wanted = 0;        // lane whose number this one wants
  uint64_t received = 0;
};

class Machine {
 public:
  static constexpr int kLanes = 32;
  static constexpr size_t kStack = 128 * 1024;
  static constexpr size_t kSharedGuard = 64;

  Index block, block_size, grid_size;
  Thread* current = nullptr;
  std::mt19937 random;
  std::vector<std::unique_ptr<Buffer>> buffers;

  static Machine*& active() {
    static Machine* machine = nullptr;
    return machine;
  }

  template <typename X>
  X* input(const X* source, size_t count) {
    buffers.push_back(std::make_unique<Buffer>(source, count * sizeof(X)));
    return reinterpret_cast<X*>(buffers.back()->data());
  }
  void* memory(size_t bytes) {
    buffers.push_back(std::make_unique<Buffer>(bytes, true));
    return buffers.back()->data();
  }

  // For writes that went around `check`.
  void check_intact() const {
    for (const auto& buffer : buffers) {
      if (!buffer->intact()) throw Failure{"memory around a buffer, or an input, was written"};
    }
  }

  void check(const void* address, size_t bytes, size_t alignment, bool writes) {
    const char* begin = static_cast<const char*>(address);
    for (const auto& buffer : buffers) {
      if (!buffer->holds(begin, bytes)) continue;
      if (writes && !buffer->writable()) fail("write to an input");
      if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("misaligned access");
      return;
    }
    fail(writes ? "write outside of all buffers" : "read outside of all buffers");
  }

  // Ends the launch from within a thread: its stack is left as it is.
  [[noreturn]] void fail(const std::string& what) {
    if (error_.empty()) {
      error_ = what + " by thread " + std::to_string(current->index.x) + " of block " + std::to_string(block.x) + ", " +
               std::to_string(block.y);
    }
    _longjmp(scheduler_, 1);
  }

  void launch(Index grid, unsigned threads, size_t shared, const std::function<void()>& kernel) {
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535u) throw Failure{"impossible grid"};
    if (threads == 0 || threads > 1024 || threads % kLanes != 0) throw Failure{"impossible block"};
    if (shared > 48 * 1024) throw Failure{"too much shared memory"};
    grid_size = grid;
    block_size = {threads, 1, 1};
    std::vector<Index> blocks;
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, 0});
    }
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (const Index& each : blocks) run_block(each, shared, kernel);
  }

  char* shared() { return shared_.data(); }

  // Waits for the other lanes; returns the number given by lane `wanted`, or for a ballot the votes of all.
  uint64_t exchange(Operation operation, uint64_t given, int wanted) {
    Thread& self = *current;
    self.waiting = operation;
    self.given = given;
    self.wanted = wanted;
    Thread* warp = &threads_[self.index.x / kLanes * kLanes];
    bool complete = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (warp[lane].finished) fail("a lane has left before the others meet");
      if (warp[lane].waiting == Operation::kNone) complete = false;
      else if (warp[lane].waiting != operation) fail("lanes meet in different operations");
    }
    if (complete) {
      meet(warp, operation);
    } else {
      yield();
    }
    return self.received;
  }

 private:
  void meet(Thread* warp, Operation operation) {
    uint64_t votes = 0;
    for (int lane = 0; lane < kLanes; ++lane) votes |= (warp[lane].given & 1) << lane;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int wanted = warp[lane].wanted;
      if (operation == Operation::kShuffle && (wanted < 0 || wanted >= kLanes)) fail("no such lane");
      warp[lane].received = operation == Operation::kShuffle ? warp[wanted].given : votes;
    }
    for (int lane = 0; lane < kLanes; ++lane) warp[lane].waiting = Operation::kNone;
  }

  // To the scheduler; returns when this thread goes on.
  void yield() {
    if (_setjmp(current->place) == 0) _longjmp(scheduler_, 1);
  }

  // The life of a fiber: it runs the thread of its index in one block after another.
  static void enter() {
    for (;;) {
      Machine& machine = *active();
      (*machine.kernel_)();
      machine.current->finished = true;
      machine.yield();
    }
  }

  void run_block(Index index, size_t shared, const std::function<void()>& kernel) {
    block = index;
    kernel_ = &kernel;
    shared_.assign(shared + kSharedGuard, static_cast<char>(0xff));
    while (threads_.size() < block_size.x) {
      threads_.emplace_back();
      threads_.back().stack = std::make_unique_for_overwrite<char[]>(kStack);
    }
    for (unsigned i = 0; i < block_size.x; ++i) start(threads_[i], i);
    std::vector<unsigned> order(block_size.x);
    for (unsigned i = 0; i < block_size.x; ++i) order[i] = i;
    for (bool left = true; left;) {
      left = false;
      bool progress = false;
      std::shuffle(order.begin(), order.end(), random);
      for (unsigned i : order) {
        Thread& thread = threads_[i];
        if (thread.finished) continue;
        left = true;
        if (thread.waiting != Operation::kNone) continue;
        progress = true;
        resume(thread);
        if (!error_.empty()) throw Failure{error_};
      }
      if (left && !progress) throw Failure{"threads wait for lanes that never come"};
    }
    const bool overrun = std::any_of(shared_.end() - kSharedGuard, shared_.end(), [](char byte) {
      return static_cast<unsigned char>(byte) != 0xff;
    });
    if (overrun) throw Failure{"write behind shared memory"};
  }

  void start(Thread& thread, unsigned i) {
    thread.index = {i, 0, 0};
    thread.finished = false;
    thread.waiting = Operation::kNone;
  }

  // Only a fiber's first step needs a context; from then on jumps are enough, and need no call of the system.
  void resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler_) != 0) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Machine::enter, 0);
    setcontext(&context);
  }

  jmp_buf scheduler_;
  std::vector<Thread> threads_;
  std::vector<char> shared_;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
};

inline Machine& machine() { return *Machine::active(); }

}  // namespace simt

#define threadIdx (::simt::machine().current->index)
#define blockIdx (::simt::machine().block)
#define blockDim (::simt::machine().block_size)
#define gridDim (::simt::machine().grid_size)

namespace detfamily::cuda {
using std::max;
using std::min;
}  // namespace detfamily::cuda

namespace detfamily::cuda::device {

template <typename X>
X load(const X* address) {
  simt::machine().check(address, sizeof(X), sizeof(X), false);
  return *address;
}
template <typename X>
X load_once(const X* address) {
  return load(address);
}
template <typename X>
void store(X* address, X x) {
  simt::machine().check(address, sizeof(X), sizeof(X), true);
  *address = x;
}

template <typename X>
X* at_row(X* first, unsigned row, int width) {
  return first + static_cast<uint64_t>(row) * static_cast<unsigned>(width);
}

template <typename X>
void add(X* address, X x) {
  simt::machine().check(address, sizeof(X), sizeof(X), true);
  *address += x;
}
inline void add(float4* address, float4 x) {
  simt::machine().check(address, sizeof(float4), sizeof(float4), true);
  address->x += x.x;
  address->y += x.y;
  address->z += x.z;
  address->w += x.w;
}
inline void raise(unsigned long long* address, unsigned long long x) {
  simt::machine().check(address, sizeof(x), sizeof(x), true);
  *address = std::max(*address, x);
}

template <typename X>
X shuffle(X x, int lane) {
  uint64_t given = 0;
  std::memcpy(&given, &x, sizeof(X));
  const uint64_t received = simt::machine().exchange(simt::Operation::kShuffle, given, lane);
  std::memcpy(&x, &received, sizeof(X));
  return x;
}
template <typename X>
X shuffle_xor(X x, int lanes) {
  return shuffle(x, static_cast<int>(threadIdx.x % 32) ^ lanes);
}
inline unsigned ballot(bool x) {
  return static_cast<unsigned>(simt::machine().exchange(simt::Operation::kBallot, x, 0));
}
inline void warp_sync() { simt::machine().exchange(simt::Operation::kSync, 0, 0); }

inline char* dynamic_shared() { return simt::machine().shared(); }

template <typename To, typename From>
To bit_copy(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline int lowest_bit(unsigned x) { return __builtin_ffs(static_cast<int>(x)) - 1; }
inline unsigned bits(float x) { return bit_copy<unsigned>(x); }
inline unsigned long long bits(double x) { return bit_copy<unsigned long long>(x); }
inline float from_bits(unsigned x) { return bit_copy<float>(x); }
inline double from_bits(unsigned long long x) { return bit_copy<double>(x); }
inline long long to_integer(float x) { return std::llrint(x); }
inline long long to_integer(double x) { return std::llrint(x); }

inline float widen(BFloat16 x) { return from_bits(static_cast<unsigned>(x.bits) << 16); }
inline float widen(Half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const int significand = exponent == 0 ? fraction : fraction + 1024;
  float magnitude = std::ldexp(static_cast<float>(significand), std::max(exponent, 1) - 25);
  if (exponent == 31) magnitude = fraction == 0 ? HUGE_VALF : NAN;
  return x.bits >> 15 ? -magnitude : magnitude;
}

inline BFloat16 narrow(float x, BFloat16) {
  const unsigned all = bits(x);
  if (std::isnan(x)) return {0x7fc0};
  return {static_cast<uint16_t>((all + 0x7fff + (all >> 16 & 1)) >> 16)};
}
inline Half narrow(float x, Half) {
  const unsigned sign = bits(x) >> 31 << 15;
  const float magnitude = std::fabs(x);
  unsigned rest;
  if (std::isnan(x)) {
    rest = 0x7e00;
  } else if (magnitude >= 65520.0f) {
    rest = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    rest = static_cast<unsigned>(std::nearbyint(magnitude * 0x1p24f));
  } else {
    const int exponent = std::ilogb(magnitude);
    rest = (exponent + 14) * 1024 + static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  }
  return {static_cast<uint16_t>(sign | rest)};
}
template <typename T>
unsigned narrow_two(float low, float high, T kind) {
  return narrow(low, kind).bits | static_cast<unsigned>(narrow(high, kind).bits) << 16;
}

}  // namespace detfamily::cuda::device
