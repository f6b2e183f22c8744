// A small pool of threads of our own: a second OpenMP runtime beside torch's would cost more than it gives.
#pragma once

#include <cstdint>

namespace ssiuu {

// Calls body(context, item) once for every item in [0, count), on the calling thread and up to threads − 1 others.
// The pool grows to what is asked for and is built anew after a fork. While another thread uses it, the caller
// does all of its own work itself. Workers take over the caller's floating-point mode (flushing of subnormals,
// rounding), so that results don't depend on who did the work. body must not throw.
void parallel_for(std::int64_t count, int threads, void (*body)(void* context, std::int64_t item), void* context);

template <class Body> void parallel_for(std::int64_t count, int threads, Body&& body) {
    parallel_for(count, threads, [](void* context, std::int64_t item) { (*static_cast<Body*>(context))(item); },
                 &body);
}

} // namespace ssiuu
