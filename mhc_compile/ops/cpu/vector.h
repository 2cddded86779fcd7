// Vectors of the widest registers of the machine, and how values of the model's dtypes become vectors of the dtype that is computed in.
//
// COMPUTE is float, or double for double streams. STORE and BRANCH are the dtypes of the streams and of the branch: float, double, or Bfloat16.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__GNUC__) && !defined(__clang__)
// Inductor's flags forbid fused multiply-add, so that its kernels round as eager ones do. Here it halves the work of the projections.
#pragma GCC optimize("fp-contract=fast")
#elif defined(__clang__)
#pragma clang fp contract(fast)
#endif

namespace mhc {

#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif

using Real = COMPUTE;
constexpr int WIDTH = BYTES / sizeof(Real);
typedef Real Vec __attribute__((vector_size(BYTES)));
typedef Real LooseVec __attribute__((vector_size(BYTES), aligned(sizeof(Real)), may_alias));

struct Bfloat16 { uint16_t bits; };
typedef uint16_t Half16 __attribute__((vector_size(BYTES / 2)));
typedef uint32_t Word32 __attribute__((vector_size(BYTES)));

inline Vec load(const Real* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store(Real* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }
inline Vec rounded(Vec value, const Real*) { return value; }

inline Vec load(const Bfloat16* from) {
    Half16 half;
    std::memcpy(&half, from, sizeof half);
    const Word32 bits = __builtin_convertvector(half, Word32) << 16;
    Vec value;
    static_assert(sizeof bits == sizeof value, "bfloat16 is computed in float");
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Round to nearest even, as torch does; a NaN stays one.
inline Word32 bfloat16_bits(Vec value) {
    Word32 bits;
    std::memcpy(&bits, &value, sizeof bits);
    const Word32 nan = (Word32)((bits & 0x7fffffffu) > 0x7f800000u);
    const Word32 even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (nan & 0x7fc0u) | (~nan & even);
}

inline void store(Bfloat16* to, Vec value) {
    const Half16 half = __builtin_convertvector(bfloat16_bits(value), Half16);
    std::memcpy(to, &half, sizeof half);
}

inline Vec rounded(Vec value, const Bfloat16*) {
    const Word32 bits = bfloat16_bits(value) << 16;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The first `count` values, and zeros; the first `count` values only. Behind the last feature `count` is zero or less.
template <typename T>
inline Vec load(const T* from, int64_t count) {
    if (count >= WIDTH) return load(from);
    T part[WIDTH] = {};
    if (count > 0) std::memcpy(part, from, count * sizeof(T));
    return load(part);
}

template <typename T>
inline void store(T* to, Vec value, int64_t count) {
    if (count >= WIDTH) return store(to, value);
    T part[WIDTH];
    store(part, value);
    if (count > 0) std::memcpy(to, part, count * sizeof(T));
}

// Halves are added to halves: a chain of additions, one after the other, would take as long as the products that it ends.
template <int BYTES_LEFT = BYTES, typename Wide>
inline Real sum(Wide value) {
    if constexpr (BYTES_LEFT == sizeof(Real)) {
        return value[0];
    } else if constexpr (BYTES_LEFT == 2 * sizeof(Real)) {
        return value[0] + value[1];
    } else {
        typedef Real Half __attribute__((vector_size(BYTES_LEFT / 2)));
        Half low, high;
        std::memcpy(&low, &value, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
        return sum<BYTES_LEFT / 2>(low + high);
    }
}

// Scratch memory that starts at a cache line.
class Scratch {
  public:
    explicit Scratch(int64_t count) : data_(static_cast<Real*>(::operator new(std::max<int64_t>(count, 1) * sizeof(Real), ALIGN))) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() { ::operator delete(data_, ALIGN); }
    Real* at(int64_t index) const { return data_ + index; }

  private:
    static constexpr std::align_val_t ALIGN{64};
    Real* data_;
};

}  // namespace mhc
