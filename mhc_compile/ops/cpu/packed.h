// A form of call that is the same for every kernel, so that one binding (binding.h) serves all of them.
//
// PACKED(name) exports name_packed(pointers, integers, reals), which calls name with its arguments in order: each pointer, int64_t and double is the
// next of its kind.
#pragma once

#include <cstdint>
#include <tuple>

namespace mhc {

struct Cursor {
    void* const* pointers;
    const int64_t* integers;
    const double* reals;

    template <typename T>
    T next() {
        if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(*pointers++);
        else if constexpr (std::is_same_v<T, double>) return *reals++;
        else return *integers++;
    }
};

template <typename... T>
void unpack(void (*function)(T...), Cursor cursor) {
    std::apply(function, std::tuple<T...>{cursor.next<T>()...});  // in braces from left to right
}

}  // namespace mhc

#define PACKED(name)                                                                                                                            \
    extern "C" __attribute__((visibility("default"))) void name##_packed(void* const* pointers, const int64_t* integers, const double* reals) { \
        mhc::unpack(name, {pointers, integers, reals});                                                                                         \
    }
