// The functions that Python calls, by packed.h. Tensors in the order of the operators' arguments, then results, sizes, iterations, threads, eps.
#pragma once

#define EXPORT static void
#define PER_INPUT(call) \
    if (in == 1) { constexpr int IN = 1; call; } else { constexpr int IN = STREAMS; call; }

// Parts of the schemas of mhc_compile/ops/fused_library.py, and the gradients of each.
#define OLD const STORE *streams, const BRANCH *branch, const Real *post, const Real *res
#define SITE const Real *phi, const Real *bias, const Real *scale
#define NEXT STORE *h, Real *next_pre, Real *next_post, Real *next_res, Real *z, Real *inverse
#define GRADS const STORE *grad_h, const Real *grad_post, const Real *grad_res
#define SAVED const Real *next_pre, const Real *next_post, const Real *z, const Real *inverse
#define D_OLD STORE *d_streams, BRANCH *d_branch, Real *d_post, Real *d_res
#define D_SITE Real *d_phi, Real *d_bias, Real *d_scale
#define NORM const Real *gain, const Real *shift
#define D_NORM Real *d_gain, Real *d_shift
#define SIZES int64_t T, int64_t C, int64_t in, int64_t iterations, int64_t norm, int64_t threads, double eps, double norm_eps
#define THE_NORM {norm, gain, shift, Real(norm_eps)}

using mhc::Real;

EXPORT mhc_read(const STORE* streams, SITE, NORM, NEXT, Real* moments, SIZES) {
    const mhc::Forward forward{streams, nullptr, nullptr, nullptr, nullptr, {phi, bias, scale, Real(eps), iterations}, nullptr, h, next_pre, next_post,
                               next_res, z, inverse, T, C, THE_NORM, moments};
    PER_INPUT((forward.run<IN, false, true>(threads)))
}

EXPORT mhc_step(OLD, SITE, NORM, STORE* out, NEXT, Real* moments, SIZES) {
    const mhc::Forward forward{streams, branch, post, res, nullptr, {phi, bias, scale, Real(eps), iterations}, out, h, next_pre, next_post, next_res, z,
                               inverse, T, C, THE_NORM, moments};
    PER_INPUT((forward.run<IN, true, true>(threads)))
}

EXPORT mhc_shifted_step(OLD, const Real* pre, SITE, NORM, STORE* out, NEXT, Real* moments, SIZES) {
    const mhc::Forward forward{streams, branch, post, res, pre, {phi, bias, scale, Real(eps), iterations}, out, h, next_pre, next_post, next_res, z,
                               inverse, T, C, THE_NORM, moments};
    PER_INPUT((forward.run<IN, true, true, true>(threads)))
}

EXPORT mhc_mix_read(OLD, const Real* pre, NORM, STORE* out, STORE* h, Real* moments, SIZES) {
    const mhc::Forward forward{streams, branch, post, res, pre, {}, out, h, nullptr, nullptr, nullptr, nullptr, nullptr, T, C, THE_NORM,
                               moments};
    PER_INPUT((forward.run<IN, true, false, true>(threads)))
}

EXPORT mhc_update(OLD, STORE* out, SIZES) {
    const mhc::Forward forward{streams, branch, post, res, nullptr, {}, out, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, T, C};
    PER_INPUT((forward.run<IN, true, false>(threads)))
}

EXPORT mhc_close(OLD, STORE* out, SIZES) { PER_INPUT((mhc::close<IN>(streams, branch, post, res, out, T, C, threads))) }

EXPORT mhc_read_backward(GRADS, const STORE* streams, SITE, SAVED, NORM, const Real* moments, STORE* d_streams, D_SITE, D_NORM, SIZES) {
    const mhc::Backward backward{nullptr, grad_h, nullptr, grad_post, grad_res, streams, nullptr, nullptr, nullptr, nullptr,
                                 {phi, bias, scale, 0, iterations}, next_pre, next_post, z, inverse, d_streams, nullptr, nullptr, nullptr, nullptr, d_phi,
                                 d_bias, d_scale, T, C, THE_NORM, moments, d_gain, d_shift};
    PER_INPUT((backward.run<IN, false, true>(threads)))
}

EXPORT mhc_step_backward(const STORE* grad_out, GRADS, OLD, SITE, SAVED, NORM, const Real* moments, D_OLD, D_SITE, D_NORM,
                          SIZES) {
    const mhc::Backward backward{grad_out, grad_h, nullptr, grad_post, grad_res, streams, branch, post, res, nullptr,
                                 {phi, bias, scale, 0, iterations}, next_pre, next_post, z, inverse, d_streams, d_branch, d_post, d_res, nullptr, d_phi,
                                 d_bias, d_scale, T, C, THE_NORM, moments, d_gain, d_shift};
    PER_INPUT((backward.run<IN, true, true>(threads)))
}

EXPORT mhc_shifted_step_backward(const STORE* grad_out, const STORE* grad_h, const Real* grad_pre, const Real* grad_post, const Real* grad_res, OLD,
                                 const Real* pre, SITE, SAVED, NORM, const Real* moments, D_OLD, Real* d_pre, D_SITE, D_NORM, SIZES) {
    const mhc::Backward backward{grad_out, grad_h, grad_pre, grad_post, grad_res, streams, branch, post, res, pre, {phi, bias, scale, 0, iterations},
                                 next_pre, next_post, z, inverse, d_streams, d_branch, d_post, d_res, d_pre, d_phi, d_bias, d_scale, T, C, THE_NORM, moments, d_gain, d_shift};
    PER_INPUT((backward.run<IN, true, true, true>(threads)))
}

EXPORT mhc_mix_read_backward(const STORE* grad_out, const STORE* grad_h, OLD, const Real* pre, NORM, const Real* moments, D_OLD, Real* d_pre,
                              D_NORM, SIZES) {
    const mhc::Backward backward{grad_out, grad_h, nullptr, nullptr, nullptr, streams, branch, post, res, pre, {nullptr, nullptr, nullptr, 0, 1}, nullptr,
                                 nullptr, nullptr, nullptr, d_streams, d_branch, d_post, d_res, d_pre, nullptr, nullptr, nullptr, T, C, THE_NORM, moments, d_gain,
                                 d_shift};
    PER_INPUT((backward.run<IN, true, false, true>(threads)))
}

EXPORT mhc_update_backward(const STORE* grad, OLD, D_OLD, SIZES) {
    const mhc::Backward backward{grad, nullptr, nullptr, nullptr, nullptr, streams, branch, post, res, nullptr, {nullptr, nullptr, nullptr, 0, 1}, nullptr,
                                 nullptr, nullptr, nullptr, d_streams, d_branch, d_post, d_res, nullptr, nullptr, nullptr, nullptr, T, C};
    PER_INPUT((backward.run<IN, true, false>(threads)))
}

EXPORT mhc_close_backward(const STORE* grad, OLD, D_OLD, SIZES) {
    PER_INPUT((mhc::close_backward<IN>(grad, streams, branch, post, res, d_streams, d_branch, d_post, d_res, T, C, threads)))
}

PACKED(mhc_read)
PACKED(mhc_step)
PACKED(mhc_shifted_step)
PACKED(mhc_mix_read)
PACKED(mhc_update)
PACKED(mhc_close)
PACKED(mhc_read_backward)
PACKED(mhc_step_backward)
PACKED(mhc_shifted_step_backward)
PACKED(mhc_mix_read_backward)
PACKED(mhc_update_backward)
PACKED(mhc_close_backward)
