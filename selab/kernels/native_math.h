/* Types that all passes share, activations, and a BatchNorm folded into one multiplication and addition. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The compiler generates each loop for several x86 levels; the loader picks one. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define INLINE static inline __attribute__((always_inline))

/* x rounded to a float before it is added to something. A product that is added unrounded stays finite where torch, which
 * stores it, has infinity. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
#define ROUNDED(x) __builtin_assoc_barrier(x)
#endif
#endif
#ifndef ROUNDED
#define ROUNDED(x) (x)
#endif

#define LANES 64  /* independent partial sums, enough to hide the latency of an addition */
#define FLUSH 256 /* positions after which partial sums are flushed, so that rounding does not grow with the map */

enum { NOTHING, RELU, HARDSWISH, SILU }; /* pre and post */
enum { ACT_RELU, ACT_SILU };
enum { GATE_SIGMOID, GATE_HARDSIGMOID };

typedef struct {
    int64_t images, channels, positions, hidden;
    int nhwc, gated, pre, post, activation, gate, threads;
    float scale, offset, eps;
} Shape;

typedef struct {
    const float *w1, *b1, *w2, *b2;
    const float *weight, *bias, *mean, *var; /* of the BatchNorm; without one, mean is null */
} Layers;

/* NaN propagates, as in torch. */
static inline float positive(float x) { return x < 0 ? 0 : x; }

static inline float hardswish(float x) {
    float t = x + 3;
    return x * (t < 0 ? 0 : t > 6 ? 6 : t) * (1.0f / 6);
}

/* e^x within two units in the last place, infinity above 88.7; below -86 a power that 1 + e^x does not show.
 * The power of two is read from the bits of a sum, because a NaN has no integer. It is halved, and the coefficients are
 * doubled, because 2^128 is no float but e^88.5 is. */
static inline float exponential(float x) {
    x = x < -86.0f ? -86.0f : x > 89.0f ? 89.0f : x;
    union {
        float value;
        uint32_t bits;
    } rounded = {x * 1.44269504f + 12582912.0f}, power; /* 1.5 * 2^23: adding it rounds to an integer */
    float n = rounded.value - 12582912.0f;
    float r = x - n * 0.693145751953125f - n * 1.42860677e-6f; /* ln 2 in two parts; the first, times n, is exact */
    float p = 2.0f / 5040;
    p = p * r + 2.0f / 720;
    p = p * r + 2.0f / 120;
    p = p * r + 2.0f / 24;
    p = p * r + 2.0f / 6;
    p = p * r + 1.0f;
    p = p * r + 2.0f;
    p = p * r + 2.0f;
    power.bits = (rounded.bits + 126) << 23;
    return p * power.value;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

static inline float silu(float x) { return x / (1.0f + exponential(-x)); }

static inline float hardsigmoid(float x) {
    float t = x + 3;
    return (t < 0 ? 0 : t > 6 ? 6 : t) / 6;
}

/* Pass a constant `kind` wherever speed matters. */
INLINE float activated(float x, int kind) {
    return kind == RELU ? positive(x) : kind == HARDSWISH ? hardswish(x) : kind == SILU ? silu(x) : x;
}

/* Per channel: x = a y + b, the folded BatchNorm; without one (`norm` is 0) x = y, because y + 0 would lose the sign of
 * a zero. */
typedef struct {
    const float *a, *b;
    int norm;
} Affine;

CLONES static void affine(const Shape *d, const Layers *l, float *a, float *b) {
    for (int64_t c = 0; l->mean && c < d->channels; c++) {
        a[c] = 1 / sqrtf(l->var[c] + d->eps) * (l->weight ? l->weight[c] : 1);
        b[c] = (l->bias ? l->bias[c] : 0) - l->mean[c] * a[c];
    }
}
