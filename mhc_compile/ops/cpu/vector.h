// Vectors of the widest registers of the machine, and how values of the model's dtypes become vectors of the dtype that is computed in.
//
// COMPUTE is float, or double for double streams. STORE and BRANCH are the dtypes of the streams and of the branch: float, double, Bfloat16, or Float16.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
struct Float16 { uint16_t bits; };
typedef uint16_t Half16 __attribute__((vector_size(BYTES / 2)));
typedef uint32_t Word32 __attribute__((vector_size(BYTES)));

// Between vectors of one size.
template <typename To, typename From>
inline To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "16-bit numbers are computed in float");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline Vec load(const Real* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store(Real* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }
inline Vec rounded(Vec value, const Real*) { return value; }

// What GCC makes of __builtin_convertvector takes up to four instructions for each of these.
inline Vec widened(Half16 half, const Bfloat16*) {
#if defined(__AVX512F__)
    return cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(cast<__m256i>(half)), 16));
#elif defined(__AVX2__)
    return cast<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(cast<__m128i>(half)), 16));
#else
    return cast<Vec>(__builtin_convertvector(half, Word32) << 16);
#endif
}

// Round to nearest even, as torch does; a NaN stays one.
inline Half16 narrowed(Vec value, const Bfloat16*) {
#if defined(__AVX512BF16__)
    return cast<Half16>(_mm512_cvtneps_pbh(cast<__m512>(value)));
#else
    const Word32 bits = cast<Word32>(value), nan = (Word32)((bits & 0x7fffffffu) > 0x7f800000u);
    const Word32 even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, word = (nan & 0x7fc0u) | (~nan & even);
#if defined(__AVX512F__)
    return cast<Half16>(_mm512_cvtepi32_epi16(cast<__m512i>(word)));
#elif defined(__AVX2__)
    const auto wide = cast<__m256i>(word);
    return cast<Half16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 8)));
#else
    return __builtin_convertvector(word, Half16);
#endif
#endif
}

#if defined(__AVX512F__)
inline Vec widened(Half16 half, const Float16*) { return cast<Vec>(_mm512_cvtph_ps(cast<__m256i>(half))); }
inline Half16 narrowed(Vec value, const Float16*) { return cast<Half16>(_mm512_cvtps_ph(cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__) && defined(__F16C__)
inline Vec widened(Half16 half, const Float16*) { return cast<Vec>(_mm256_cvtph_ps(cast<__m128i>(half))); }
inline Half16 narrowed(Vec value, const Float16*) { return cast<Half16>(_mm256_cvtps_ph(cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__FLT16_MANT_DIG__)  // the compiler has the type; without it there are no kernels for float16
typedef _Float16 Float16s __attribute__((vector_size(BYTES / 2)));
typedef float Floats __attribute__((vector_size(BYTES)));
inline Vec widened(Half16 half, const Float16*) { return cast<Vec>(__builtin_convertvector(cast<Float16s>(half), Floats)); }
inline Half16 narrowed(Vec value, const Float16*) { return cast<Half16>(__builtin_convertvector(cast<Floats>(value), Float16s)); }
#endif

template <typename T>
inline Vec load(const T* from) {
    Half16 half;
    std::memcpy(&half, from, sizeof half);
    return widened(half, from);
}

template <typename T>
inline void store(T* to, Vec value) {
    const Half16 half = narrowed(value, to);
    std::memcpy(to, &half, sizeof half);
}

template <typename T>
inline Vec rounded(Vec value, const T* as) {
    return widened(narrowed(value, as), as);
}

// The compiler calls these where a function is large, which takes longer than they do.
#define INLINED [[gnu::always_inline]] inline

// The first `count` values, and zeros; the first `count` values only. Behind the last feature `count` is zero or less.
template <typename T>
INLINED Vec load(const T* from, int64_t count) {
    if (count >= WIDTH) return load(from);
    T part[WIDTH] = {};
    if (count > 0) std::memcpy(part, from, count * sizeof(T));
    return load(part);
}

template <typename T>
INLINED void store(T* to, Vec value, int64_t count) {
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
