/* Squeeze-and-Excitation blocks on the CPU, in single precision, with as few passes over the feature maps as possible.
 *
 * This module receives addresses of dense tensors, which selab/kernels/cpu.py has checked, so it builds without torch's
 * headers and compiler settings. The address 0 means that there is no such tensor. A feature map holds N images of C
 * channels with P positions each; `nhwc` says that the channels of a position are adjacent (channels last).
 *
 *   x = a y + b;  m = pre(x);  s = mean(m);  u = w1 s + b1;  v = w2 act(u) + b2;  g = scale gate(v) + offset
 *   out = post(g m + r)
 *
 * a and b fold a BatchNorm at inference (without one, x is y); `pre` and `post` are activations or nothing; r is the
 * shortcut. Without `gated`, g is 1, which leaves the pass of a BatchNorm, a residual addition and an activation. The
 * backward pass supports no BatchNorm, and no activation but ReLU. `squeezed` computes s alone, and `scaled` out from
 * given g, for blocks whose layers run elsewhere.
 *
 * NaN, infinities, signed zeros and overflows are those of the separate torch operations: products and BatchNorms are
 * rounded where torch stores them. Only the order of additions differs.
 *
 * One translation unit: the headers hold only static functions, so that the compiler can inline across them.
 *
 *   native_math.h      types, activations, the folded BatchNorm
 *   native_forward.h   squeeze, excitation, scale and addition; the forward pass
 *   native_backward.h  the backward pass
 *   native_call.h      CachedCall: the forward pass again, for as long as nothing has changed
 *
 * Source: Hu et al., arXiv 1709.01507, eq. 2-4; scale and addition as one pass ("Axpy") come from the authors' release.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "native_backward.h"
#include "native_call.h"
#include "native_forward.h"
#include "native_math.h"

static PyObject *done(int failed) {
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static int forward_unlocked(const Shape *d, const Layers *l, const Maps *m) {
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = forward(d, l, m);
    Py_END_ALLOW_THREADS
    return failed;
}

/* Pack the sizes of a feature map and its block into bytes, so that they are parsed once and not in every call. */
static PyObject *py_shape(PyObject *self, PyObject *args) {
    (void)self;
    Shape d;
    memset(&d, 0, sizeof d);
    long long images, channels, positions, hidden;
    if (!PyArg_ParseTuple(args, "LLLLiiiiiiifff", &images, &channels, &positions, &hidden, &d.nhwc, &d.gated, &d.pre,
                          &d.post, &d.activation, &d.gate, &d.threads, &d.scale, &d.offset, &d.eps))
        return NULL;
    d.images = images, d.channels = channels, d.positions = positions, d.hidden = hidden;
    return PyBytes_FromStringAndSize((const char *)&d, sizeof d);
}

static PyObject *py_gated(PyObject *self, PyObject *args) {
    (void)self;
    Shape d;
    const char *raw;
    Py_ssize_t size;
    Address w1, b1, w2, b2, weight, bias, mean, var, y, r, out, kept;
    if (!PyArg_ParseTuple(args, "y#KKKKKKKKKKKK", &raw, &size, &w1, &b1, &w2, &b2, &weight, &bias, &mean, &var, &y, &r,
                          &out, &kept))
        return NULL;
    if (!read_shape(raw, size, &d)) return NULL;
    Layers l = {AT(w1), AT(b1), AT(w2), AT(b2), AT(weight), AT(bias), AT(mean), AT(var)};
    Maps m = {.y = AT(y), .r = AT(r), .out = AT(out), .kept = AT(kept)};
    return done(forward_unlocked(&d, &l, &m));
}

/* The means of a feature map's channels, after BatchNorm and first activation. */
static PyObject *py_squeezed(PyObject *self, PyObject *args) {
    (void)self;
    Shape d;
    const char *raw;
    Py_ssize_t size;
    Address weight, bias, mean, var, y, means;
    if (!PyArg_ParseTuple(args, "y#KKKKKK", &raw, &size, &weight, &bias, &mean, &var, &y, &means)) return NULL;
    if (!read_shape(raw, size, &d)) return NULL;
    Layers l = {.weight = AT(weight), .bias = AT(bias), .mean = AT(mean), .var = AT(var)};
    Maps m = {.y = AT(y), .means = AT(means)};
    return done(means ? forward_unlocked(&d, &l, &m) : 0); /* no address: there are no means */
}

/* The scale and what follows it, with gates that were computed elsewhere. */
static PyObject *py_scaled(PyObject *self, PyObject *args) {
    (void)self;
    Shape d;
    const char *raw;
    Py_ssize_t size;
    Address weight, bias, mean, var, y, r, gates, out;
    if (!PyArg_ParseTuple(args, "y#KKKKKKKK", &raw, &size, &weight, &bias, &mean, &var, &y, &r, &gates, &out))
        return NULL;
    if (!read_shape(raw, size, &d)) return NULL;
    Layers l = {.weight = AT(weight), .bias = AT(bias), .mean = AT(mean), .var = AT(var)};
    Maps m = {.y = AT(y), .r = AT(r), .out = AT(out), .gates = AT(gates)};
    return done(gates ? forward_unlocked(&d, &l, &m) : 0); /* no address: there is no element */
}

static PyObject *py_gated_backward(PyObject *self, PyObject *args) {
    (void)self;
    Shape d;
    const char *raw;
    Py_ssize_t size;
    Address w1, w2, dout, out, y, kept, dz, dy, dv, du;
    if (!PyArg_ParseTuple(args, "y#KKKKKKKKKK", &raw, &size, &w1, &w2, &dout, &out, &y, &kept, &dz, &dy, &dv, &du))
        return NULL;
    if (!read_shape(raw, size, &d)) return NULL;
    Layers l = {.w1 = AT(w1), .w2 = AT(w2)};
    Gradients m = {AT(dout), AT(out), AT(y), AT(kept), AT(dz), AT(dy), AT(dv), AT(du)};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = backward(&d, &l, &m);
    Py_END_ALLOW_THREADS
    return done(failed);
}

/* To be raised, here and in selab/kernels/cpu.py, with every change of names, arguments or their meaning: a library that
 * was built from older sources is then left alone. */
#define INTERFACE 6

static PyMethodDef methods[] = {
    {"shape", py_shape, METH_VARARGS, "Pack the sizes of a feature map and its block, for the other functions."},
    {"gated", py_gated, METH_VARARGS, "Run the forward pass: shape, layers, feature maps."},
    {"squeezed", py_squeezed, METH_VARARGS, "Run the squeeze alone: shape, BatchNorm, feature map, means."},
    {"scaled", py_scaled, METH_VARARGS, "Run the scale alone: shape, BatchNorm, feature maps, gates, output."},
    {"gated_backward", py_gated_backward, METH_VARARGS, "Run the backward pass: shape, layers, feature maps."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Squeeze-and-Excitation on the CPU, given addresses.", -1, methods, 0, 0, 0, 0};
PyMODINIT_FUNC PyInit__native(void) {
    PyObject **names[] = {&S_shape, &S_stride, &S_dtype, &S_is_cpu, &S_data_ptr, &S_numel, &S_level,
                          &S_dict,  &S_class,  &S_pending_norm, &S_pending_relu, &S_back, &S_lasti, &S_use_count,
                          &S_untyped_storage, &S_cdata, &S_resizable, &S_weakref};
    static const char *words[] = {"shape",    "stride",    "dtype",     "is_cpu", "data_ptr", "numel", "_current_level",
                                  "__dict__", "__class__", "_pending_norm", "_pending_relu", "f_back", "f_lasti",
                                  "_use_count", "untyped_storage", "_cdata", "resizable", "__weakref__"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!(*names[i] = PyUnicode_InternFromString(words[i]))) return NULL;
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = module ? PyType_FromSpec(&cached_call_spec) : NULL;
    if (!type || PyModule_AddObjectRef(module, "CachedCall", type) < 0 ||
        PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) < 0) {
        Py_XDECREF(type);
        Py_XDECREF(module);
        return NULL;
    }
    Py_DECREF(type);
    return module;
}
