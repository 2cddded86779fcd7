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

// The threads of a parallel region share the chunks.
template <int P>
void pack(const Real* phi, int64_t C, Real* out) {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < C; first += CHUNK) {
        for (int i = 0; i < P; ++i) {
            Real* rows = out + (first * P + i * CHUNK) * K;
            for (int64_t c = 0; c < CHUNK; ++c) {
                Real row[K] = {};
                if (first + c < C)
                    for (int j = (P == 1 ? 0 : i); j <= (P == 1 ? N - 1 : i); ++j)
                        for (int k = 0; k < K; ++k) row[k] += phi[(j * C + first + c) * K + k];
                for (int k = 0; k < K; ++k) rows[k * CHUNK + c] = row[k];
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

// grads[t][i] = sum_k scaled[t][k] phi[i][k], over one chunk.
template <int P>
inline void spread(const Real (*scaled)[K], const Real* phi, Real (*grads)[P][CHUNK]) {
    for (int i = 0; i < P; ++i) {
        for (int t0 = 0; t0 < TILE; t0 += TOKENS) {
            Vec sums[TOKENS][VECTORS] = {};
            for (int k = 0; k < K; ++k) {
                Vec row[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) {
                    row[v] = load(phi + (i * K + k) * CHUNK + v * WIDTH);
                    IN_REGISTER(row[v]);
                }
#pragma GCC unroll 4
                for (int t = 0; t < TOKENS; ++t) {
                    Vec factor = scaled[t0 + t][k] - Vec{};
                    IN_REGISTER(factor);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) sums[t][v] += factor * row[v];
                }
            }
            for (int t = 0; t < TOKENS; ++t)
                for (int v = 0; v < VECTORS; ++v) store(grads[t0 + t][i] + v * WIDTH, sums[t][v]);
        }
    }
}

// d_phi[i][k] += sum_t scaled[t][k] values[t][i], over one chunk.
template <int P, int FROM = 0>
inline void gather(const Real (*scaled)[K], const Real (*values)[P][CHUNK], Real* d_phi) {
    if constexpr (FROM < K) {
        constexpr int MANY = K - FROM < COLUMNS ? K - FROM : COLUMNS;
        for (int i = 0; i < P; ++i) {
            Real* rows = d_phi + (i * K + FROM) * CHUNK;
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
                    Vec factor = scaled[t][FROM + k] - Vec{};
                    IN_REGISTER(factor);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) sums[k][v] += factor * value[v];
                }
            }
            for (int k = 0; k < MANY; ++k)
                for (int v = 0; v < VECTORS; ++v) store(rows + k * CHUNK + v * WIDTH, sums[k][v]);
        }
        gather<P, FROM + MANY>(scaled, values, d_phi);
    }
}

}  // namespace mhc
