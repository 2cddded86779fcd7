// Steps of streams that are not in memory. Written last were the streams X_0 [T, IN, C]; MANY sites later, with y_1 to y_MANY the outputs of their
// branches, the streams are
//
//     X_MANY = sum_s mix_s source_s,   sources: the rows of X_0, then y_1 ... y_MANY,   mix_k = [res_k mix_(k-1) | post_k],   mix_0 = 1
//
// with a matrix `mix` [N, IN + MANY] for every token. A step computes them from the sources, and writes them only if `out` is given. Its backward is
// that of step.h for the last of the sites, whose old streams X_(MANY-1) come from the same sources:
//
//     d_pre_j = sum_s mix_js <dh, source_s>,   d_res_il = <G_i, X_(MANY-1)_l> = sum_s mix_(MANY-1)_ls <G_i, source_s>
//
// Equations: mhc_compile/ops/lazy_reference.py, which the tests hold this against.
#pragma once

namespace mhc {

constexpr int MOST = MOST_BRANCHES;

struct Sources {
    const STORE* streams;                   // [T, IN, C]
    const BRANCH* const* branches;          // MANY of [T, C]
    const Real *const *post, *const *res;   // MANY of [T, N] and [T, N, N]
    int64_t C;

    template <int IN, int MANY>
    INLINED void load_at(int64_t token, int64_t c, Vec (&x)[IN + MANY]) const {
        for (int l = 0; l < IN; ++l) x[l] = load(streams + (token * IN + l) * C + c, C - c);
        for (int j = 0; j < MANY; ++j) x[IN + j] = load(branches[j] + token * C + c, C - c);
    }

    template <int IN, int MANY>
    void fetch(int64_t token, int64_t first) const {
        prefetch<IN>(streams, token, C, first);
        for (int j = 0; j < MANY; ++j) prefetch<1>(branches[j], token, C, first);
    }
};

// `mix` of X_MANY and of X_(MANY-1), of one token.
template <int IN, int MANY>
struct Mix {
    Real last[N][IN + MANY] = {}, before[N][IN + MANY] = {};

    Mix() = default;
    Mix(const Sources& from, int64_t token) {
        for (int i = 0; i < N; ++i) before[i][IN == 1 ? 0 : i] = 1;
        for (int k = 0; k < MANY; ++k) {
            const Real *post = from.post[k] + token * N, *res = from.res[k] + token * N * N;
            if (k) std::memcpy(before, last, sizeof last);
            for (int i = 0; i < N; ++i) {
                for (int s = 0; s < IN + k; ++s) {
                    last[i][s] = 0;
                    for (int l = 0; l < N; ++l) last[i][s] += res[i * N + l] * before[l][s];
                }
                last[i][IN + k] = post[i];
            }
        }
    }

    Vec stream(int i, const Vec (&x)[IN + MANY]) const {
        Vec total = last[i][0] * x[0];
        for (int s = 1; s < IN + MANY; ++s) total += last[i][s] * x[s];
        return total;
    }
};

struct LazyForward : Forward {
    Sources old;

    template <int IN, int MANY>
    void lazy(int64_t threads) const {
        tiles<N, true>(threads, [this](int64_t first, const Real* packed) { one_lazy<IN, MANY>(first, packed); });
    }

    template <int IN, int MANY>
    void one_lazy(int64_t first, const Real* packed) const {
        constexpr int S = IN + MANY;
        const int64_t count = std::min<int64_t>(TILE, T - first);
        Vec squares[TILE] = {}, products[TILE][K] = {};
        alignas(64) Real values[TILE][N][CHUNK];
        Mix<IN, MANY> mix[TILE];
        if (count < TILE) std::memset(values, 0, sizeof values);
        for (int64_t t = 0; t < count; ++t) mix[t] = Mix<IN, MANY>(old, first + t);
        for (int64_t c0 = 0; c0 < C; c0 += CHUNK) {
            for (int64_t t = 0; t < count; ++t) {
                old.fetch<IN, MANY>(first + t, c0 + CHUNK);
                for (int64_t c = 0; c < CHUNK; c += WIDTH) {
                    Vec x[S];
                    old.load_at<IN, MANY>(first + t, c0 + c, x);
                    for (int i = 0; i < N; ++i) {
                        const Vec stream = mix[t].stream(i, x);
                        if (out) store(out + ((first + t) * N + i) * C + c0 + c, stream, C - c0 - c);
                        keep(rounded(stream, h), values[t][i] + c, squares[t]);
                    }
                }
            }
            multiply<N>(values, packed, c0, count, products);
        }
        coefficients<N>(first, count, squares, products, !packed);
        for (int64_t t = 0; t < count; ++t) {
            const int64_t token = first + t;
            Real weight[S] = {};
            for (int j = 0; j < N; ++j)
                for (int s = 0; s < S; ++s) weight[s] += next_pre[token * N + j] * mix[t].last[j][s];
            for (int64_t c = 0; c < C; c += WIDTH) {
                Vec x[S], total = {};
                old.load_at<IN, MANY>(token, c, x);
                for (int s = 0; s < S; ++s) total += weight[s] * x[s];
                store(h + token * C + c, total, C - c);
            }
        }
        normalize(first, count);
    }
};

struct LazyBackward : Backward {
    Sources old;

    template <int IN, int MANY>
    void lazy(int64_t threads) const {
        tiles<N, true>(threads, [this](int64_t first, const Term* packed, const Own& own) { one_lazy<IN, MANY>(first, packed, own); });
    }

    template <int IN, int MANY>
    void one_lazy(int64_t first, const Term* packed, const Own& own) const {
        constexpr int S = IN + MANY;
        const int64_t count = std::min<int64_t>(TILE, T - first);
        Outer<N> outer;
        Real radial[TILE] = {}, d_pre[TILE][N] = {};
        Mix<IN, MANY> mix[TILE];
        const STORE* d_h = products<IN, MANY>(first, count, mix, d_pre, own);
        logits<N>(first, count, d_pre, outer.factors, radial, own);
        outer.begin(count);
        Vec dots[TILE][N][S] = {};
        for (int64_t c0 = 0; c0 < C; c0 += CHUNK) {
            alignas(64) Real grads[TILE][N][CHUNK];  // what the projection gives to X
            outer.spread(packed, c0, grads);
            for (int64_t t = 0; t < count; ++t)
                chunk<IN, MANY>(first, t, c0, d_h ? d_h + t * C : nullptr, radial[t], mix[t], grads[t], outer, dots[t]);
            outer.gather(own.phi, c0);
        }
        for (int64_t t = 0; t < count; ++t) {
            const int64_t token = first + t;
            for (int i = 0; i < N; ++i) {
                d_post[token * N + i] = sum(dots[t][i][S - 1]);
                Real with[S];
                for (int s = 0; s < S - 1; ++s) with[s] = sum(dots[t][i][s]);
                for (int l = 0; l < N; ++l) {
                    Real total = 0;
                    for (int s = 0; s < S - 1; ++s) total += mix[t].before[l][s] * with[s];
                    d_res[(token * N + i) * N + l] = total;
                }
            }
        }
    }

  private:
    // `mix`, <dh, X_j>, and dh, which is returned. A function of its own, as `logits` is.
    template <int IN, int MANY>
    [[gnu::noinline]] const STORE* products(int64_t first, int64_t count, Mix<IN, MANY>* mix, Real (*d_pre)[N], const Own& own) const {
        constexpr int S = IN + MANY;
        STORE* scratch = reinterpret_cast<STORE*>(own.d_h);
        const STORE* d_h = !grad_h ? nullptr : norm.kind ? scratch : grad_h + first * C;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t token = first + t;
            mix[t] = Mix<IN, MANY>(old, token);
            if (!d_h) continue;
            if (norm.kind) {
                Real weight[S] = {};
                for (int j = 0; j < N; ++j)
                    for (int s = 0; s < S; ++s) weight[s] += next_pre[token * N + j] * mix[t].last[j][s];
                const auto at = [&](int64_t c, Vec (&x)[S]) { old.load_at<IN, MANY>(token, c, x); };
                norm.backward(weight, at, grad_h + token * C, moments + 2 * token, C, own.row, scratch + t * C, own.gain, own.shift);
            }
            Vec dots[S] = {};
            for (int64_t c = 0; c < C; c += WIDTH) {
                Vec x[S];
                old.load_at<IN, MANY>(token, c, x);
                const Vec dh = load(d_h + t * C + c, C - c);
                for (int s = 0; s < S; ++s) dots[s] += dh * x[s];
            }
            for (int s = 0; s < S; ++s) {
                const Real dot = sum(dots[s]);
                for (int j = 0; j < N; ++j) d_pre[t][j] += mix[t].last[j][s] * dot;
            }
        }
        return d_h;
    }

    template <int IN, int MANY>
    void chunk(int64_t first, int64_t t, int64_t c0, const STORE* d_h, Real radial, const Mix<IN, MANY>& mix, Real (*grads)[CHUNK],
               Outer<N>& outer, Vec (*dots)[IN + MANY]) const {
        const int64_t token = first + t;
        constexpr int S = IN + MANY;
        const Real *post = old.post[MANY - 1] + token * N, *res = old.res[MANY - 1] + token * N * N;
        old.fetch<IN, MANY>(token, c0 + CHUNK);
        if (grad_out) prefetch<N>(grad_out, token, C, c0 + CHUNK);
        prefetch<N, 1>(d_streams, token, C, c0 + CHUNK);
        prefetch<1, 1>(d_branch, token, C, c0 + CHUNK);
        for (int64_t c = 0; c < CHUNK; c += WIDTH) {
            const int64_t at = c0 + c, rest = C - at;
            Vec x[S], d_x[N] = {}, d_y = {};
            old.load_at<IN, MANY>(token, at, x);
            const Vec dh = d_h ? load(d_h + at, rest) : Vec{};
            for (int i = 0; i < N; ++i) {
                const Vec value = rounded(mix.stream(i, x), grad_h);
                store(outer.values[t][i] + c, value);
                Vec total = load(grads[i] + c) + next_pre[token * N + i] * dh - radial * value;
                if (grad_out) total += load(grad_out + (token * N + i) * C + at, rest);
                d_y += post[i] * total;
                for (int l = 0; l < N; ++l) d_x[l] += res[i * N + l] * total;
                store(grads[i] + c, total);
            }
            for (int l = 0; l < N; ++l) store(d_streams + (token * N + l) * C + at, d_x[l], rest);
            store(d_branch + token * C + at, d_y, rest);
        }
        add_dots(grads, [&](int64_t c, Vec (&x)[S]) { old.load_at<IN, MANY>(token, c0 + c, x); }, dots);
    }
};

// The mean of the streams, as in close.h.
template <int IN, int MANY>
void lazy_close(const Sources& old, STORE* out, int64_t T, int64_t threads) {
    constexpr int S = IN + MANY;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        const Mix<IN, MANY> mix(old, t);
        Real weight[S] = {};
        for (int s = 0; s < S; ++s)
            for (int i = 0; i < N; ++i) weight[s] += mix.last[i][s] / N;
        for (int64_t c = 0; c < old.C; c += WIDTH) {
            Vec x[S], total = {};
            old.load_at<IN, MANY>(t, c, x);
            for (int s = 0; s < S; ++s) total += weight[s] * x[s];
            store(out + t * old.C + c, total, old.C - c);
        }
    }
}

template <int IN, int MANY>
void lazy_close_backward(const STORE* grad, const Sources& old, STORE* d_streams, BRANCH* d_branch, Real* d_post, Real* d_res, int64_t T,
                         int64_t threads) {
    constexpr int S = IN + MANY;
    const int64_t C = old.C;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        const Mix<IN, MANY> mix(old, t);
        Real to_stream[N] = {}, to_branch = 0;  // means of the last site's res and post
        for (int i = 0; i < N; ++i) {
            to_branch += old.post[MANY - 1][t * N + i] / N;
            for (int l = 0; l < N; ++l) to_stream[l] += old.res[MANY - 1][(t * N + i) * N + l] / N;
        }
        Vec dots[S] = {};
        for (int64_t c = 0; c < C; c += WIDTH) {
            Vec x[S];
            old.load_at<IN, MANY>(t, c, x);
            const Vec g = load(grad + t * C + c, C - c);
            for (int s = 0; s < S; ++s) dots[s] += g * x[s];
            for (int l = 0; l < N; ++l) store(d_streams + (t * N + l) * C + c, to_stream[l] * g, C - c);
            store(d_branch + t * C + c, to_branch * g, C - c);
        }
        Real with[S];
        for (int s = 0; s < S; ++s) with[s] = sum(dots[s]) / N;
        for (int l = 0; l < N; ++l) {
            Real total = 0;
            for (int s = 0; s < S - 1; ++s) total += mix.before[l][s] * with[s];
            for (int i = 0; i < N; ++i) d_res[(t * N + i) * N + l] = total;
        }
        for (int i = 0; i < N; ++i) d_post[t * N + i] = with[S - 1];
    }
}

}  // namespace mhc

using mhc::Real;

#define EXPORT static void
#define OLD const STORE *streams, const BRANCH* const* branches, const Real* const* post, const Real* const* res
#define SITE const Real *phi, const Real *bias, const Real *scale
#define NORM const Real *gain, const Real *shift
#define SIZES int64_t T, int64_t C, int64_t in, int64_t many, int64_t iterations, int64_t norm, int64_t threads, double eps, double norm_eps

// call(IN, MANY) for the number of streams in memory and of branches, LEAST to MOST.
template <int IN, int MANY, typename Call>
void per_count(int64_t many, Call call) {
    if (many == MANY) call(std::integral_constant<int, IN>(), std::integral_constant<int, MANY>());
    else if constexpr (MANY < mhc::MOST) per_count<IN, MANY + 1>(many, call);
}

template <int LEAST, typename Call>
void per_input(int64_t in, int64_t many, Call call) {
    if (in == 1) per_count<1, LEAST>(many, call);
    else per_count<STREAMS, LEAST>(many, call);
}

EXPORT mhc_lazy_step(OLD, SITE, NORM, STORE* out, STORE* h, Real* next_pre, Real* next_post, Real* next_res, Real* z, Real* inverse, Real* moments,
                     SIZES) {
    const mhc::LazyForward forward{{nullptr, nullptr, nullptr, nullptr, nullptr, {phi, bias, scale, Real(eps), iterations}, out, h, next_pre, next_post,
                                    next_res, z, inverse, T, C, {norm, gain, shift, Real(norm_eps)}, moments}, {streams, branches, post, res, C}};
    per_input<1>(in, many, [&](auto from, auto count) { forward.lazy<from.value, count.value>(threads); });
}

EXPORT mhc_lazy_step_backward(const STORE* grad_out, const STORE* grad_h, const Real* grad_post, const Real* grad_res, OLD, SITE, const Real* next_pre,
                              const Real* next_post, const Real* z, const Real* inverse, NORM, const Real* moments, STORE* d_streams,
                              BRANCH* d_branch, Real* d_post, Real* d_res, Real* d_phi, Real* d_bias, Real* d_scale, Real* d_gain, Real* d_shift, SIZES) {
    const mhc::LazyBackward backward{{grad_out, grad_h, nullptr, grad_post, grad_res, nullptr, nullptr, nullptr, nullptr, nullptr,
                                      {phi, bias, scale, 0, iterations}, next_pre, next_post, z, inverse, d_streams, d_branch, d_post, d_res, nullptr, d_phi,
                                      d_bias, d_scale, T, C, {norm, gain, shift, Real(norm_eps)}, moments, d_gain, d_shift}, {streams, branches, post, res, C}};
    per_input<2>(in, many, [&](auto from, auto count) { backward.lazy<from.value, count.value>(threads); });
}

EXPORT mhc_lazy_close(OLD, STORE* out, SIZES) {
    per_input<2>(in, many, [&](auto from, auto count) { mhc::lazy_close<from.value, count.value>({streams, branches, post, res, C}, out, T, threads); });
}

EXPORT mhc_lazy_close_backward(const STORE* grad, OLD, STORE* d_streams, BRANCH* d_branch, Real* d_post, Real* d_res, SIZES) {
    per_input<2>(in, many, [&](auto from, auto count) {
        mhc::lazy_close_backward<from.value, count.value>(grad, {streams, branches, post, res, C}, d_streams, d_branch, d_post, d_res, T, threads);
    });
}

PACKED(mhc_lazy_step)
PACKED(mhc_lazy_step_backward)
PACKED(mhc_lazy_close)
PACKED(mhc_lazy_close_backward)
