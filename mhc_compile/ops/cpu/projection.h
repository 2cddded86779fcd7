// The three products with phi, thin matrix products of which one side is a tile in the cache.
//
// phi is packed as [chunks][P][K][CHUNK], so that vectors run along the features in all three and what is worked on together lies together: zeros in the
// padding, and the rows of equal streams added up (P is the number of streams in memory). Each product works on a block of accumulators that fills the registers, such that every value that is loaded
// is used several times.
#pragma once

namespace mhc {

constexpr int N = STREAMS;
using Mixing = Family<Real, N>;                 // the mapping, of which one header was included
constexpr int K = 2 * N + Mixing::LOGITS;       // columns of phi
constexpr int TILE = LANES;                     // tokens
constexpr int VECTORS = 4;
constexpr int CHUNK = VECTORS * WIDTH;          // features that are worked on together
constexpr int TOKENS = 4;                       // rows of a block of accumulators
constexpr int64_t FEW = 4 * TILE;               // tokens for which phi is not packed
constexpr int COLUMNS = BYTES == 64 ? 6 : 3;    // and its columns: 24 of 32 registers, or 12 of 16

// The compiler would rather load a value again than keep it in a register; a core loads one such vector a cycle, and multiplies one.
#if defined(__x86_64__) && defined(__AVX2__)
#define IN_REGISTER(value) asm("" : "+v"(value))
#else
#define IN_REGISTER(value)
#endif

inline int64_t chunks(int64_t features) { return (features + CHUNK - 1) / CHUNK; }

// The threads of a parallel region share the chunks. `write(to, row, k)` writes the k-th of `steps` parts of a row of K numbers.
template <int P, typename Part, typename Write>
void pack(const Real* phi, int64_t C, Part* out, int steps, Write write) {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < C; first += CHUNK) {
        for (int i = 0; i < P; ++i) {
            Part* rows = out + (first * P + i * CHUNK) * steps;
            for (int64_t c = 0; c < CHUNK; ++c) {
                Real row[K] = {};
                if (first + c < C)
                    for (int j = (P == 1 ? 0 : i); j <= (P == 1 ? N - 1 : i); ++j)
                        for (int k = 0; k < K; ++k) row[k] += phi[(j * C + first + c) * K + k];
                for (int k = 0; k < steps; ++k) write(rows + k * CHUNK + c, row, k);
            }
        }
    }
}

// products[t][k] += values[t] . phi[k], over one chunk; the lanes of the products are added up at the end.
template <int P, int FROM = 0>
inline void project(const Real (*values)[P][CHUNK], const Real* phi, Vec (*products)[K]) {
    if constexpr (FROM < K) {
        constexpr int MANY = K - FROM < COLUMNS ? K - FROM : COLUMNS;
        for (int t0 = 0; t0 < TILE; t0 += TOKENS) {
            Vec sums[TOKENS][MANY];
            for (int t = 0; t < TOKENS; ++t)
                for (int k = 0; k < MANY; ++k) sums[t][k] = products[t0 + t][FROM + k];
            for (int i = 0; i < P; ++i) {
                const Real* rows = phi + (i * K + FROM) * CHUNK;
                for (int c = 0; c < CHUNK; c += WIDTH) {
                    Vec value[TOKENS];
#pragma GCC unroll 4
                    for (int t = 0; t < TOKENS; ++t) {
                        value[t] = load(values[t0 + t][i] + c);
                        IN_REGISTER(value[t]);
                    }
#pragma GCC unroll 6
                    for (int k = 0; k < MANY; ++k) {
                        Vec row = load(rows + k * CHUNK + c);
                        IN_REGISTER(row);
#pragma GCC unroll 4
                        for (int t = 0; t < TOKENS; ++t) sums[t][k] += value[t] * row;
                    }
                }
            }
            for (int t = 0; t < TOKENS; ++t)
                for (int k = 0; k < MANY; ++k) products[t0 + t][FROM + k] = sums[t][k];
        }
        project<P, FROM + MANY>(values, phi, products);
    }
}

// The same with phi as it is, [N C, K], for so few tokens that packing it would take longer than the product. Vectors run along the columns: products[t]
// holds K sums, one after the other.
template <int P>
inline void project_rows(const Real (*values)[P][CHUNK], const Real* phi, int64_t C, int64_t c0, int64_t count, Vec (*products)[K]) {
    constexpr int FULL = K / WIDTH, REST = K % WIDTH, MANY = FULL + (REST > 0);
    const int64_t width = std::min<int64_t>(CHUNK, C - c0);
    for (int64_t t0 = 0; t0 < count; t0 += TOKENS) {
        Vec sums[TOKENS][MANY];
        for (int t = 0; t < TOKENS; ++t)
            for (int v = 0; v < MANY; ++v) sums[t][v] = products[t0 + t][v];
        for (int j = 0; j < N; ++j) {
            for (int64_t c = 0; c < width; ++c) {
                const Real* from = phi + (j * C + c0 + c) * K;
                Vec row[MANY];
                for (int v = 0; v < FULL; ++v) row[v] = load(from + v * WIDTH);
                if constexpr (REST > 0) row[FULL] = load(from + FULL * WIDTH, REST);
#pragma GCC unroll 4
                for (int t = 0; t < TOKENS; ++t)
                    for (int v = 0; v < MANY; ++v) sums[t][v] += values[t0 + t][P == 1 ? 0 : j][c] * row[v];
            }
        }
        for (int t = 0; t < TOKENS; ++t)
            for (int v = 0; v < MANY; ++v) products[t0 + t][v] = sums[t][v];
    }
}

// What the gradient of X' is summed from: numbers; of bfloat16 streams, where the machine multiplies these, pairs of bfloat16. They lose about as much
// as that gradient does by being rounded. All other products are of float: the coefficients and the gradients of parameters are not rounded.
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
constexpr bool PAIRS = std::is_same_v<STORE, Bfloat16>;
#else
constexpr bool PAIRS = false;
#endif
constexpr int STEPS = PAIRS ? (K + 1) / 2 : K;  // terms of a row of phi
using Term = std::conditional_t<PAIRS, uint32_t, Real>;
using TermVec = std::conditional_t<PAIRS, Word32, Vec>;

inline TermVec load_terms(const Term* from) {
    TermVec terms;
    std::memcpy(&terms, from, sizeof terms);
    return terms;
}

// The k-th term of K numbers.
inline void write_term(Real* to, const Real* numbers, int k) { *to = numbers[k]; }
inline Vec plus_product(Vec sum, Vec a, Vec b) { return sum + a * b; }
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
inline void write_term(uint32_t* to, const Real* numbers, int k) {
    const __m128 low = _mm_set_ss(numbers[2 * k]), high = _mm_set_ss(2 * k + 1 < K ? numbers[2 * k + 1] : 0);
    *to = _mm_cvtsi128_si32(cast<__m128i>(_mm_cvtneps_pbh(_mm_unpacklo_ps(low, high))));
}
inline Vec plus_product(Vec sum, Word32 a, Word32 b) { return cast<Vec>(_mm512_dpbf16_ps(cast<__m512>(sum), cast<__m512bh>(a), cast<__m512bh>(b))); }
#endif

// The two products of the backward, of one tile.
template <int P>
struct Outer {
    Real factors[TILE][K] = {};               // dz inverse
    Term terms[TILE][STEPS];                  // the same
    alignas(64) Real values[TILE][P][CHUNK];  // X' of one chunk

    // Called once `factors` are known.
    void begin(int64_t count) {
        for (int t = 0; t < TILE; ++t)
            for (int k = 0; k < STEPS; ++k) write_term(&terms[t][k], factors[t], k);
        if (count < TILE) std::memset(values, 0, sizeof values);
    }

    // grads[t][i] = sum_k factors[t][k] phi[i][k], over the chunk that begins at c0.
    void spread(const Term* phi, int64_t c0, Real (*grads)[P][CHUNK]) const {
        for (int i = 0; i < P; ++i) {
            for (int t0 = 0; t0 < TILE; t0 += TOKENS) {
                Vec sums[TOKENS][VECTORS] = {};
                for (int k = 0; k < STEPS; ++k) {
                    TermVec row[VECTORS];
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) {
                        row[v] = load_terms(phi + ((c0 / CHUNK * P + i) * STEPS + k) * CHUNK + v * WIDTH);
                        IN_REGISTER(row[v]);
                    }
#pragma GCC unroll 4
                    for (int t = 0; t < TOKENS; ++t) {
                        TermVec factor = terms[t0 + t][k] - TermVec{};
                        IN_REGISTER(factor);
#pragma GCC unroll 4
                        for (int v = 0; v < VECTORS; ++v) sums[t][v] = plus_product(sums[t][v], factor, row[v]);
                    }
                }
                for (int t = 0; t < TOKENS; ++t)
                    for (int v = 0; v < VECTORS; ++v) store(grads[t0 + t][i] + v * WIDTH, sums[t][v]);
            }
        }
    }

    // d_phi[i][k] += sum_t factors[t][k] values[t][i], over that chunk.
    template <int FROM = 0>
    void gather(Real* d_phi, int64_t c0) const {
        if constexpr (FROM < K) {
            constexpr int MANY = K - FROM < COLUMNS ? K - FROM : COLUMNS;
            for (int i = 0; i < P; ++i) {
                Real* rows = d_phi + ((c0 / CHUNK * P + i) * K + FROM) * CHUNK;
                Vec sums[MANY][VECTORS];
                for (int k = 0; k < MANY; ++k)
                    for (int v = 0; v < VECTORS; ++v) sums[k][v] = load(rows + k * CHUNK + v * WIDTH);
                for (int t = 0; t < TILE; ++t) {
                    Vec value[VECTORS];
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) {
                        value[v] = load(values[t][i] + v * WIDTH);
                        IN_REGISTER(value[v]);
                    }
#pragma GCC unroll 6
                    for (int k = 0; k < MANY; ++k) {
                        Vec factor = factors[t][FROM + k] - Vec{};
                        IN_REGISTER(factor);
#pragma GCC unroll 4
                        for (int v = 0; v < VECTORS; ++v) sums[k][v] += factor * value[v];
                    }
                }
                for (int k = 0; k < MANY; ++k)
                    for (int v = 0; v < VECTORS; ++v) store(rows + k * CHUNK + v * WIDTH, sums[k][v]);
            }
            gather<FROM + MANY>(d_phi, c0);
        }
    }
};

}  // namespace mhc
