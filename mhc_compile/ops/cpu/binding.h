// Calls from Python of the functions that packed.h exports. ctypes takes some 20 us for the 26 arguments of a step, this 1.
//
// It knows no type of torch: a function of torch's gives the address of a tensor's data.
#pragma once

#include <Python.h>

#include <cstdint>
#include <stdexcept>

namespace {

struct Target {
    void (*function)(void* const*, const int64_t*, const double*);
    void* (*address_of)(PyObject*);
};

struct Arguments {
    static constexpr int MOST = 128;
    void *pointers[MOST], *listed[MOST];
    int64_t integers[MOST];
    double reals[MOST];
    int pointer = 0, list = 0, integer = 0, real = 0;

    void add(PyObject* value, const Target& target) {
        if (pointer == MOST || integer == MOST || real == MOST) throw std::runtime_error("too many arguments");
        if (value == Py_None) pointers[pointer++] = nullptr;
        else if (PyFloat_Check(value)) reals[real++] = PyFloat_AS_DOUBLE(value);
        else if (PyLong_Check(value)) integers[integer++] = PyLong_AsLongLong(value);
        else if (PyList_Check(value)) {
            pointers[pointer++] = listed + list;
            for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); ++i) {
                if (list == MOST) throw std::runtime_error("too many tensors in lists");
                listed[list++] = target.address_of(PyList_GET_ITEM(value, i));
            }
        } else pointers[pointer++] = target.address_of(value);
    }
};

PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t count) {
    const Target& target = *static_cast<Target*>(PyCapsule_GetPointer(self, nullptr));
    Arguments given;
    try {
        for (Py_ssize_t i = 0; i < count; ++i) given.add(values[i], target);
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_TypeError, error.what());
        return nullptr;
    }
    if (PyErr_Occurred()) return nullptr;  // an integer of more than 64 bits
    Py_BEGIN_ALLOW_THREADS;
    target.function(given.pointers, given.integers, given.reals);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyMethodDef METHOD = {"kernel", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL,
                      "Call with tensors (None: a null pointer, a list: an array of pointers), integers and floats, each kind in order."};

void drop(PyObject* capsule) { delete static_cast<Target*>(PyCapsule_GetPointer(capsule, nullptr)); }

}  // namespace

// A Python function that calls the exported function at an address. address_of is torch's.
extern "C" __attribute__((visibility("default"))) PyObject* mhc_bind(void* function, void* address_of) {
    Target* target = new Target{reinterpret_cast<decltype(Target::function)>(function), reinterpret_cast<decltype(Target::address_of)>(address_of)};
    PyObject* capsule = PyCapsule_New(target, nullptr, drop);
    if (!capsule) return nullptr;
    PyObject* bound = PyCFunction_New(&METHOD, capsule);
    Py_DECREF(capsule);
    return bound;
}
