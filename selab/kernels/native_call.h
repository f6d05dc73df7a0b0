/* A cached dispatch decision: the forward pass again, for as long as nothing has changed. */
#pragma once
#include <Python.h>

#include "native_forward.h"

typedef unsigned long long Address;
#define AT(address) ((float *)(uintptr_t)(address))

static int read_shape(const char *raw, Py_ssize_t size, Shape *d) {
    if (size != (Py_ssize_t)sizeof *d) {
        PyErr_SetString(PyExc_ValueError, "the first argument must come from shape()");
        return 0;
    }
    memcpy(d, raw, sizeof *d);
    return 1;
}

/* Repeat `forward` for feature maps like the one that it was chosen for. Called with a feature map, a shortcut or None and
 * the number of references to the feature map, it returns the output, or None as soon as anything has changed;
 * selab/kernels/dispatch.py lists what. A feature map may have a deferred BatchNorm and ReLU, which its attributes
 * `_pending_norm` and `_pending_relu` name; its class is `kind` meanwhile (selab/kernels/deferred_bn.py). A call with empty
 * shape_bytes is that of the deferred module itself: it sets the attribute `mark` and returns the feature map. Memory is
 * reused, and a module deferred, only while nothing else holds the feature map (`owner`, selab/kernels/ownership.py).
 * In C, because between two convolutions the interpreter's data have left the caches, and the same checks in Python cost
 * as much as a row of the feature map. */
enum {
    BYTES, FLAGS, HOOKS, CHILDREN, ATTRIBUTES, WEIGHTS, NORM, RECTIFIER, MARK, OWNER, KIND, TENSOR, DTYPE, SIZE, STRIDE, LEVELS, COUNT,
    THREADS, EMPTY_LIKE, HELD
};

/* Entries of `owner`: sys._getframe and its argument, (code, offset) of the frames from there outwards, the references to
 * the feature map, torch's counts of it and of its memory, the function for the latter, references to the object of its
 * memory. */
enum { GETFRAME, DEPTH, FRAMES, REFERENCES, TENSOR_USES, STORAGE_USES, COUNT_STORAGE, STORAGE_REFERENCES, OWNER_SIZE };

#define LAYERS 8 /* tensors of a `Layers` */

typedef struct {
    PyObject_HEAD
    PyObject *held[HELD];
    int joined, can_overwrite;
} CachedCall;

static PyObject *S_shape, *S_stride, *S_dtype, *S_is_cpu, *S_data_ptr, *S_numel, *S_level, *S_dict, *S_class, *S_pending_norm,
    *S_pending_relu, *S_back, *S_lasti, *S_use_count, *S_untyped_storage, *S_cdata, *S_resizable, *S_weakref;

static int cached_call_init(PyObject *object, PyObject *args, PyObject *kwargs) {
    CachedCall *self = (CachedCall *)object;
    PyObject **held = self->held;
    static char *names[] = {"shape_bytes", "flags",      "hooks",  "children", "attributes", "weights", "norm",
                            "relu",        "mark",       "owner",  "kind",     "tensor",     "dtype",   "size",
                            "stride",      "levels",     "count",  "threads",  "empty_like", "joined",  "can_overwrite",
                            NULL};
    if (held[BYTES]) {
        PyErr_SetString(PyExc_TypeError, "a CachedCall cannot be initialised twice");
        return -1;
    }
    PyObject *given[HELD];
    PyTypeObject *tuple = &PyTuple_Type;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "SO!O!O!O!O!OOOOOOOOOO!OOO|pp", names, given + BYTES, tuple, given + FLAGS,
                                     tuple, given + HOOKS, tuple, given + CHILDREN, tuple, given + ATTRIBUTES, tuple,
                                     given + WEIGHTS, given + NORM, given + RECTIFIER, given + MARK, given + OWNER,
                                     given + KIND, given + TENSOR, given + DTYPE, given + SIZE, given + STRIDE,
                                     &PyDict_Type, given + LEVELS, given + COUNT, given + THREADS, given + EMPTY_LIKE,
                                     &self->joined, &self->can_overwrite))
        return -1;
    if (given[OWNER] != Py_None && (!PyTuple_Check(given[OWNER]) || PyTuple_Size(given[OWNER]) != OWNER_SIZE)) {
        PyErr_SetString(PyExc_ValueError, "owner must be None or a tuple of its entries");
        return -1;
    }
    if (PyTuple_Size(given[WEIGHTS]) > LAYERS) {
        PyErr_SetString(PyExc_ValueError, "more weights than a block has");
        return -1;
    }
    for (int i = 0; i < HELD; i++) held[i] = Py_NewRef(given[i]);
    return 0;
}

static int cached_call_traverse(PyObject *object, visitproc visit, void *arg) {
    CachedCall *self = (CachedCall *)object;
    Py_VISIT(Py_TYPE(object));
    for (int i = 0; i < HELD; i++) Py_VISIT(self->held[i]);
    return 0;
}

static int cached_call_clear(PyObject *object) {
    CachedCall *self = (CachedCall *)object;
    for (int i = 0; i < HELD; i++) Py_CLEAR(self->held[i]);
    return 0;
}

static void cached_call_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    cached_call_clear(object);
    PyObject_GC_Del(object);
    Py_DECREF(type);
}

/* Compare an attribute, or the result of a method without arguments: 1 if equal, 0 if not, -1 on an error. */
static int is_so(PyObject *object, PyObject *name, int method, PyObject *expected) {
    PyObject *found =
        method ? PyObject_CallMethodObjArgs(object, name, NULL) : PyObject_GetAttr(object, name);
    if (!found) return -1;
    int same = found == expected ? 1 : PyObject_RichCompareBool(found, expected, Py_EQ);
    Py_DECREF(found);
    return same;
}

static int matches(const CachedCall *d, PyObject *map) {
    if ((PyObject *)Py_TYPE(map) != d->held[TENSOR]) return 0;
    int same = is_so(map, S_shape, 0, d->held[SIZE]);
    if (same > 0) same = is_so(map, S_stride, 1, d->held[STRIDE]);
    if (same > 0) same = is_so(map, S_dtype, 0, d->held[DTYPE]);
    return same > 0 ? is_so(map, S_is_cpu, 0, Py_True) : same;
}

/* 1 if no torch flag is set, no hook is registered, and children, attributes and the number of threads are unchanged. */
static int is_unchanged(const CachedCall *d) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[HOOKS]); i++)
        if (PyDict_Size(PyTuple_GetItem(d->held[HOOKS], i))) return 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[FLAGS]); i++) {
        PyObject *up = PyObject_CallNoArgs(PyTuple_GetItem(d->held[FLAGS], i));
        if (!up) return -1;
        int is_up = PyObject_IsTrue(up);
        Py_DECREF(up);
        if (is_up) return is_up < 0 ? -1 : 0;
    }
    PyObject *level = PyDict_GetItemWithError(d->held[LEVELS], S_level);
    if (!level) return PyErr_Occurred() ? -1 : 0;
    if (PyLong_AsLong(level) >= 0) return 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[CHILDREN]); i++) {
        PyObject *pair = PyTuple_GetItem(d->held[CHILDREN], i);
        PyObject *now = PyTuple_GetItem(pair, 0), *before = PyTuple_GetItem(pair, 1), *value;
        if (PyDict_Size(now) != PyTuple_Size(before)) return 0;
        Py_ssize_t at = 0, index = 0;
        while (PyDict_Next(now, &at, NULL, &value))
            if (value != PyTuple_GetItem(before, index++)) return 0;
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[ATTRIBUTES]); i++) {
        PyObject *one = PyTuple_GetItem(d->held[ATTRIBUTES], i);
        PyObject *now = PyDict_GetItemWithError(PyTuple_GetItem(one, 0), PyTuple_GetItem(one, 1));
        PyObject *expected = PyTuple_GetItem(one, 2); /* `...`: there must be no such attribute */
        if (now != (expected == Py_Ellipsis ? NULL : expected)) return PyErr_Occurred() ? -1 : 0;
        if (!now && PyErr_Occurred()) return -1;
    }
    PyObject *threads = PyObject_CallNoArgs(d->held[COUNT]);
    if (!threads) return -1;
    int same = PyObject_RichCompareBool(threads, d->held[THREADS], Py_EQ);
    Py_DECREF(threads);
    return same;
}

static int address(PyObject *tensor, Address *into) {
    PyObject *found = PyObject_CallMethodObjArgs(tensor, S_data_ptr, NULL);
    if (!found) return -1;
    *into = PyLong_AsUnsignedLongLong(found);
    Py_DECREF(found);
    return PyErr_Occurred() ? -1 : 1;
}

/* Read the addresses of `Layers`; each entry is None or (a module's parameters or buffers, name, tensor or None, numel). */
static int read_weights(const CachedCall *d, Address *into) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[WEIGHTS]); i++) {
        PyObject *one = PyTuple_GetItem(d->held[WEIGHTS], i);
        if (one == Py_None) continue;
        PyObject *now = PyDict_GetItemWithError(PyTuple_GetItem(one, 0), PyTuple_GetItem(one, 1));
        PyObject *before = PyTuple_GetItem(one, 2);
        if (now != before) return PyErr_Occurred() ? -1 : 0;
        if (before == Py_None) continue;
        int same = is_so(before, S_dtype, 0, d->held[DTYPE]);
        if (same > 0) same = is_so(before, S_numel, 1, PyTuple_GetItem(one, 3));
        if (same > 0) same = address(before, into + i);
        if (same <= 0) return same;
    }
    return 1;
}

/* 1 if the deferred BatchNorm (or ReLU) of this feature map is `module` (None: there is none). */
static int is_pending(PyObject *marks, PyObject *name, PyObject *module) {
    PyObject *found = PyDict_GetItemWithError(marks, name);
    if (!found && PyErr_Occurred()) return -1;
    return (found ? found : Py_None) == module;
}

/* 1 if the calling functions, from `frame` (whose reference is taken over) outwards, are at these instructions. */
static int is_called_from(PyObject *frame, PyObject *frames) {
    int same = 1;
    for (Py_ssize_t i = 0; same > 0 && i < PyTuple_Size(frames); i++) {
        PyObject *one = PyTuple_GetItem(frames, i);
        const long offset = PyLong_AsLong(PyTuple_GetItem(one, 1));
        if (i) {
            PyObject *back = PyObject_GetAttr(frame, S_back);
            Py_DECREF(frame);
            if (!back) return -1;
            frame = back;
        }
        if (frame == Py_None) same = 0;
        if (!same) break;
        PyObject *code = (PyObject *)PyFrame_GetCode((PyFrameObject *)frame);
        same = code == PyTuple_GetItem(one, 0);
        Py_DECREF(code);
        if (same && offset >= 0) same = is_so(frame, S_lasti, 0, PyTuple_GetItem(one, 1));
    }
    Py_DECREF(frame);
    return same;
}

/* 1 if nothing but this call holds the feature map, as selab.kernels.ownership.is_exclusive. */
static int is_exclusive(const CachedCall *d, PyObject *map, PyObject *references) {
    PyObject *owner = d->held[OWNER];
    int same = PyObject_RichCompareBool(references, PyTuple_GetItem(owner, REFERENCES), Py_EQ);
    if (same <= 0) return same;
    PyObject *frame = PyObject_CallFunctionObjArgs(PyTuple_GetItem(owner, GETFRAME), PyTuple_GetItem(owner, DEPTH), NULL);
    if (!frame) return -1;
    same = is_called_from(frame, PyTuple_GetItem(owner, FRAMES));
    if (same > 0) same = is_so(map, S_weakref, 0, Py_None);
    if (same > 0) same = is_so(map, S_use_count, 1, PyTuple_GetItem(owner, TENSOR_USES));
    if (same <= 0) return same;
    PyObject *storage = PyObject_CallMethodObjArgs(map, S_untyped_storage, NULL);
    if (!storage) return -1;
    same = Py_REFCNT(storage) == PyLong_AsLong(PyTuple_GetItem(owner, STORAGE_REFERENCES));
    if (same) same = is_so(storage, S_resizable, 1, Py_True);
    PyObject *cdata = same > 0 ? PyObject_GetAttr(storage, S_cdata) : NULL;
    Py_DECREF(storage);
    if (!cdata) return same > 0 ? -1 : same;
    PyObject *uses = PyObject_CallFunctionObjArgs(PyTuple_GetItem(owner, COUNT_STORAGE), cdata, NULL);
    Py_DECREF(cdata);
    if (!uses) return -1;
    same = PyObject_RichCompareBool(uses, PyTuple_GetItem(owner, STORAGE_USES), Py_EQ);
    Py_DECREF(uses);
    return same;
}

static PyObject *run(CachedCall *self, PyObject *y, PyObject *r, PyObject *references, PyObject *marks) {
    Address layers[LAYERS] = {0}, maps[3] = {0};
    PyObject **held = self->held;
    const int marking = PyBytes_Size(held[BYTES]) == 0, pending = held[NORM] != Py_None || held[RECTIFIER] != Py_None;
    int same = is_unchanged(self);
    if (same > 0) same = is_pending(marks, S_pending_norm, held[NORM]);
    if (same > 0) same = is_pending(marks, S_pending_relu, held[RECTIFIER]);
    /* A DeferredTensor normalises itself on its first use, so its own class is restored first. From here on its consumer
     * is responsible, also if this call is not taken. */
    if (same > 0 && pending && PyObject_SetAttr(y, S_class, held[TENSOR]) < 0) return NULL;
    if (same > 0) same = matches(self, y);
    if (same > 0 && marking) {
        if (held[OWNER] != Py_None) same = is_exclusive(self, y, references);
        if (same < 0) return NULL;
        if (!same) Py_RETURN_NONE;
        if (PyDict_SetItem(marks, PyTuple_GetItem(held[MARK], 0), PyTuple_GetItem(held[MARK], 1)) < 0) return NULL;
        return PyObject_SetAttr(y, S_class, held[KIND]) < 0 ? NULL : Py_NewRef(y);
    }
    if (same > 0 && self->joined) same = matches(self, r);
    if (same > 0) same = read_weights(self, layers);
    if (same > 0) same = address(y, maps);
    if (same > 0 && self->joined) same = address(r, maps + 1);
    /* A deferred module has proved already that nothing else holds its output. */
    int overwrites = self->can_overwrite;
    if (same > 0 && overwrites && !pending && held[OWNER] != Py_None) overwrites = is_exclusive(self, y, references);
    if (same < 0 || overwrites < 0) return NULL;
    if (!same) Py_RETURN_NONE;
    PyObject *out = overwrites ? Py_NewRef(y) : PyObject_CallFunctionObjArgs(held[EMPTY_LIKE], y, NULL);
    if (!out) return NULL;
    char *raw;
    Py_ssize_t size;
    Shape d;
    if (address(out, maps + 2) < 0 || PyBytes_AsStringAndSize(held[BYTES], &raw, &size) < 0 ||
        !read_shape(raw, size, &d) || (held[NORM] != Py_None && PyDict_DelItem(marks, S_pending_norm) < 0) ||
        (held[RECTIFIER] != Py_None && PyDict_DelItem(marks, S_pending_relu) < 0)) {
        Py_DECREF(out);
        return NULL;
    }
    Layers l = {AT(layers[0]), AT(layers[1]), AT(layers[2]), AT(layers[3]),
                AT(layers[4]), AT(layers[5]), AT(layers[6]), AT(layers[7])};
    Maps m = {.y = AT(maps[0]), .r = AT(maps[1]), .out = AT(maps[2])};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = forward(&d, &l, &m);
    Py_END_ALLOW_THREADS
    if (failed) {
        Py_DECREF(out);
        return PyErr_NoMemory();
    }
    return out;
}

static PyObject *cached_call_call(PyObject *object, PyObject *args, PyObject *kwargs) {
    CachedCall *self = (CachedCall *)object;
    PyObject *y, *r, *references = Py_None;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "OO|O", &y, &r, &references)) return NULL;
    if (!self->held[BYTES] || (r != Py_None) != self->joined) Py_RETURN_NONE;
    PyObject *marks = PyObject_GetAttr(y, S_dict);
    if (!marks) return NULL;
    PyObject *out = run(self, y, r, references, marks);
    Py_DECREF(marks);
    return out;
}

static PyType_Slot cached_call_slots[] = {
    {Py_tp_init, (void *)cached_call_init},
    {Py_tp_dealloc, (void *)cached_call_dealloc},
    {Py_tp_traverse, (void *)cached_call_traverse},
    {Py_tp_clear, (void *)cached_call_clear},
    {Py_tp_call, (void *)cached_call_call},
    {Py_tp_doc, "The forward pass again, or None once anything has changed."},
    {0, NULL},
};
static PyType_Spec cached_call_spec = {"selab.kernels._native.CachedCall", sizeof(CachedCall), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, cached_call_slots};
