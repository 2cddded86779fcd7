// One site's end and the next one's beginning in one pass over the streams, a tile of tokens at a time: the tile stays in the cache between the
// passes that need all of its features.
//
//     MIX    X'_i = sum_l res_il X_l + post_i y
//     READ   inverse = 1 / rms(vec(X')), z = vec(X') phi inverse, pre, post, res from z, h = sum_j pre_j X'_j
//     GIVEN  h = sum_j pre_j X'_j with weights that are known before, so that h is written while X' is in registers: a READ then leaves h alone
//
// MIX and READ: mhc::step. MIX alone: mhc::update. READ alone, of the streams as they are: mhc::read. All three: mhc::shifted_step.
// MIX and GIVEN: mhc::mix_read. Where there is a norm, h is its result. IN is the number of streams that the input has in memory: N, or 1 where the N streams are equal.
// Equations: mhc_compile/ops/reference.py, which the tests hold this against.
#pragma once

namespace mhc {

// What a convention adds to the paper's equations (mhc_compile/convention.py): 0, 2 and 0 in the paper.
constexpr Real PRE_PLUS = PRE_EPS, POST_TIMES = POST_RANGE, POST_PLUS = POST_EPS;

inline Real plus(Real value, Real eps) { return eps == 0 ? value : value + eps; }

// exp is taken of negative numbers only, as lanes.h has it.
inline Real sigmoid(Real x) {
    const Real e = exp_negative(-std::abs(x));
    return (x < 0 ? e : Real(1)) / (1 + e);
}

// The next chunk of a token's rows [ROWS, C] while one is worked on: rows of a tile are too many for the machine to follow by itself.
template <int ROWS, int WRITTEN = 0, typename T>
inline void prefetch(const T* rows, int64_t token, int64_t C, int64_t first) {
    for (int row = 0; row < ROWS; ++row)
        for (int64_t c = first; c < std::min(first + CHUNK, C); c += 64 / sizeof(T)) __builtin_prefetch(rows + (token * ROWS + row) * C + c, WRITTEN);
}

struct Site {
    const Real *phi, *bias, *scale;  // [N C, K], [K], [3]
    Real eps;
    int64_t iterations;

    // dlogit / dz.
    Real gain(int k) const { return Real(SCALE_SPEED) * scale[k < N ? 0 : k < 2 * N ? 1 : 2]; }
    Real logit(int k, Real z) const { return gain(k) * z + Real(GATE_SPEED) * bias[k]; }
};

// What a token's old streams weigh in its new ones. Equal streams are one stream that weighs as much as all of them.
template <int IN>
struct Weights {
    Real res[N][IN], post[N];

    Weights(const Real* res_of_token, const Real* post_of_token) {
        for (int i = 0; i < N; ++i) {
            post[i] = post_of_token[i];
            for (int l = 0; l < IN; ++l) res[i][l] = 0;
            for (int l = 0; l < N; ++l) res[i][IN == 1 ? 0 : l] += res_of_token[i * N + l];
        }
    }

    template <typename Streams>
    void mix(const Streams& x, Vec y, Vec (&out)[N]) const {
        for (int i = 0; i < N; ++i) {
            out[i] = post[i] * y;
            for (int l = 0; l < IN; ++l) out[i] += res[i][l] * x[l];
        }
    }
};

struct Forward {
    const STORE* streams;  // [T, IN, C]
    const BRANCH* branch;  // [T, C]
    const Real *post, *res, *pre;  // [T, N], [T, N, N]; [T, N] if GIVEN
    Site site;
    STORE *out, *h;                                    // [T, N, C], [T, C]
    Real *next_pre, *next_post, *next_res, *z, *inverse;  // [T, N], [T, N], [T, N, N], [T, K], [T]
    int64_t T, C;
    Norm norm = {};
    Real* moments = nullptr;  // [T, 2]

    template <int IN, bool MIX, bool READ, bool GIVEN = false>
    void run(int64_t threads) const {
        tiles<MIX ? N : IN, READ>(threads, [this](int64_t first, const Real* packed) { one<IN, MIX, READ, GIVEN>(first, packed); });
    }

    // work(first token, packed phi of P streams, or null for few tokens) for every tile.
    template <int P, bool READ, typename Work>
    void tiles(int64_t threads, Work work) const {
        const int64_t count = (T + TILE - 1) / TILE;
        if (READ && T <= FEW) {
            for (int64_t tile = 0; tile < count; ++tile) work(tile * TILE, nullptr);
            return;
        }
        const Scratch packed(READ ? chunks(C) * P * K * CHUNK : 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            if constexpr (READ) pack<P>(site.phi, C, packed.at(0), K, [](Real* to, const Real* row, int k) { *to = row[k]; });
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < count; ++tile) work(tile * TILE, packed.at(0));
        }
    }

    template <int IN, bool MIX, bool READ, bool GIVEN>
    void one(int64_t first, const Real* packed) const {
        constexpr int P = MIX ? N : IN;
        const int64_t count = std::min<int64_t>(TILE, T - first);
        Vec squares[TILE] = {}, products[TILE][K] = {};
        alignas(64) Real values[TILE][P][CHUNK];
        if (READ && count < TILE) std::memset(values, 0, sizeof values);
        for (int64_t c0 = 0; c0 < C; c0 += CHUNK) {
            for (int64_t t = 0; t < count; ++t) {
                const int64_t token = first + t;
                if constexpr (MIX) {
                    const Weights<IN> weights(res + token * N * N, post + token * N);
                    prefetch<IN>(streams, token, C, c0 + CHUNK);
                    prefetch<1>(branch, token, C, c0 + CHUNK);
                    if (packed) prefetch<N, 1>(out, token, C, c0 + CHUNK);  // of few tokens it is in the cache
                    for (int64_t c = 0; c < CHUNK; c += WIDTH) {
                        const int64_t rest = C - c0 - c;
                        Vec x[IN], mixed[N];
                        for (int l = 0; l < IN; ++l) x[l] = load(streams + (token * IN + l) * C + c0 + c, rest);
                        weights.mix(x, load(branch + token * C + c0 + c, rest), mixed);
                        Vec total = {};
                        for (int i = 0; i < N; ++i) {
                            store(out + (token * N + i) * C + c0 + c, mixed[i], rest);
                            if constexpr (READ) keep(rounded(mixed[i], out), values[t][i] + c, squares[t]);
                            if constexpr (GIVEN) total += pre[token * N + i] * rounded(mixed[i], out);
                        }
                        if constexpr (GIVEN) store(h + token * C + c0 + c, total, rest);
                    }
                } else {
                    prefetch<IN>(streams, token, C, c0 + CHUNK);
                    for (int64_t c = 0; c < CHUNK; c += WIDTH)
                        for (int i = 0; i < P; ++i)
                            keep(load(streams + (token * IN + i) * C + c0 + c, C - c0 - c), values[t][i] + c, squares[t]);
                }
            }
            if constexpr (READ) multiply<P>(values, packed, c0, count, products);
        }
        if constexpr (READ) {
            coefficients<P>(first, count, squares, products, !packed);
            for (int64_t t = first; !GIVEN && t < first + count; ++t) collapse<P>(MIX ? out : streams, t);
        }
        if constexpr (READ || GIVEN) normalize(first, count);
    }

  protected:
    void normalize(int64_t first, int64_t count) const {
        for (int64_t t = first; norm.kind && t < first + count; ++t) norm.forward(h + t * C, moments + 2 * t, C);
    }

    static void keep(Vec value, Real* to, Vec& square) {
        store(to, value);
        square += value * value;
    }

    template <int P>
    void multiply(const Real (*values)[P][CHUNK], const Real* packed, int64_t c0, int64_t count, Vec (*products)[K]) const {
        if (packed) project<P>(values, packed + c0 * P * K, products);
        else project_rows<P>(values, site.phi, C, c0, count, products);
    }

    // The lanes of a product are still to be added up, or `added`: then products[t] are K numbers.
    template <int P>
    void coefficients(int64_t first, int64_t count, const Vec* squares, const Vec (*products)[K], bool added) const {
        Mixing mixing;
        Real logits[K][LANES] = {};
        for (int64_t t = 0; t < count; ++t) {
            const Real scaling = 1 / std::sqrt(sum(squares[t]) / (P * C) + site.eps);
            const int64_t token = first + t;
            inverse[token] = scaling;
            for (int k = 0; k < K; ++k) {
                const Real product = (added ? products[t][k / WIDTH][k % WIDTH] : sum(products[t][k])) * scaling;
                z[token * K + k] = product;
                logits[k][t] = site.logit(k, product);
            }
        }
        for (int k = 0; k < 2 * N; ++k) EACH_LANE logits[k][l] = sigmoid(logits[k][l]);
        for (int64_t t = 0; t < count; ++t) {
            for (int i = 0; i < N; ++i) {
                next_pre[(first + t) * N + i] = plus(logits[i][t], PRE_PLUS);
                next_post[(first + t) * N + i] = plus(POST_TIMES * logits[N + i][t], POST_PLUS);
            }
        }
        for (int k = 0; k < Mixing::LOGITS; ++k) std::memcpy(mixing.at(k), logits[2 * N + k], sizeof logits[0]);
        mixing.forward(site.iterations);
        store_matrices<Mixing::TURNED>(mixing.m, next_res + first * N * N, count);
    }

    template <int P>
    void collapse(const STORE* from, int64_t token) const {
        Real weight[P] = {};
        for (int j = 0; j < N; ++j) weight[P == 1 ? 0 : j] += next_pre[token * N + j];
        for (int64_t c = 0; c < C; c += WIDTH) {
            Vec total = {};
            for (int j = 0; j < P; ++j) total += weight[j] * load(from + (token * P + j) * C + c, C - c);
            store(h + token * C + c, total, C - c);
        }
    }
};

}  // namespace mhc
