// The norm of a branch's input h, a token at a time, while its row is in the cache. Equations: mhc_compile/ops/norm_reference.py.
#pragma once

namespace mhc {

struct Norm {
    int64_t kind = 0;                              // none, root mean square, layer
    const Real *gain = nullptr, *shift = nullptr;  // [C] or null
    Real eps = 0;

    static constexpr int64_t LAYER = 2;

    // Normalize a row in place. `moments` are the mean and the factor.
    void forward(STORE* h, Real* moments, int64_t C) const {
        Vec total = {}, squares = {};
        if (kind == LAYER)
            for (int64_t c = 0; c < C; c += WIDTH) total += load(h + c, C - c);
        const Real mean = sum(total) / C;
        for (int64_t c = 0; c < C; c += WIDTH) {
            Vec value = load(h + c, C - c) - mean;
            if (C - c < WIDTH)
                for (int64_t l = C - c; l < WIDTH; ++l) value[l] = 0;  // no features
            squares += value * value;
        }
        const Real factor = 1 / std::sqrt(sum(squares) / C + eps);
        for (int64_t c = 0; c < C; c += WIDTH) {
            Vec value = (load(h + c, C - c) - mean) * factor;
            if (gain) value *= load(gain + c, C - c);
            if (shift) value += load(shift + c, C - c);
            store(h + c, value, C - c);
        }
        moments[0] = mean;
        moments[1] = factor;
    }

    // From the gradient of the normalized row to that of h = sum_s weight_s source_s, whose vectors `at(c, sources)` loads. Adds to the sums of gain
    // and shift; `row` is scratch.
    template <int S, typename At>
    void backward(const Real (&weight)[S], At at, const STORE* grad, const Real* moments, int64_t C, Real* row, STORE* d_h, Real* d_gain,
                  Real* d_shift) const {
        const Real mean = moments[0], factor = moments[1];
        Vec total = {}, products = {};
        for (int64_t c = 0; c < C; c += WIDTH) {
            Vec source[S], h = {};
            at(c, source);
            for (int s = 0; s < S; ++s) h += weight[s] * source[s];
            const Vec value = (h - mean) * factor, g = load(grad + c, C - c), u = times_gain(g, c, C);
            store(row + c, value);
            if (gain) store(d_gain + c, load(d_gain + c) + g * value);
            if (shift) store(d_shift + c, load(d_shift + c) + g);
            total += u;
            products += u * value;
        }
        const Real level = kind == LAYER ? sum(total) / C : 0, along = sum(products) / C;
        for (int64_t c = 0; c < C; c += WIDTH)
            store(d_h + c, (times_gain(load(grad + c, C - c), c, C) - level - along * load(row + c)) * factor, C - c);
    }

  private:
    Vec times_gain(Vec value, int64_t c, int64_t C) const { return gain ? value * load(gain + c, C - c) : value; }
};

}  // namespace mhc
