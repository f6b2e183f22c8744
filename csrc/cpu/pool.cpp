#include "pool.h"

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define SSIUU_FORKS 1
#endif

namespace ssiuu {
namespace {

struct Job {
    std::int64_t count;
    void (*body)(void*, std::int64_t);
    void* context;
    std::fenv_t mode;
    std::atomic<std::int64_t> next{0};
    int others;
    int unfinished;

    void work() {
        for (std::int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, item);
    }
};

class Pool {
public:
    // held by the caller whose job runs
    std::mutex in_use;

    void run(Job& job) {
        grow(job.others);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job.others = job.others < workers_ ? job.others : workers_;
            job.unfinished = job.others;
            job_ = &job;
            ++generation_;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return job.unfinished == 0; });
        job_ = nullptr;
    }

private:
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    std::uint64_t generation_ = 0;
    int workers_ = 0;

    void grow(int wanted) {
        std::lock_guard<std::mutex> lock(mutex_);
        try {
            while (workers_ < wanted) {
                std::thread(&Pool::serve, this, workers_, generation_).detach();
                ++workers_;
            }
        } catch (const std::system_error&) {
            // the system gives no more threads: those there are do the work
            return;
        }
    }

    void serve(int id, std::uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            Job* job = job_;
            if (job == nullptr || id >= job->others) continue;
            lock.unlock();
            std::fesetenv(&job->mode);
            job->work();
            lock.lock();
            if (--job->unfinished == 0) done_.notify_one();
        }
    }
};

// never destroyed: its threads wait in it until the process ends
alignas(Pool) unsigned char storage[sizeof(Pool)];

void build() { new (storage) Pool; }

Pool& pool() {
    static const bool built = [] {
        build();
#if defined(SSIUU_FORKS)
        // a child has none of its parent's threads, and locks in whatever state they were
        pthread_atfork(nullptr, nullptr, build);
#endif
        return true;
    }();
    (void)built;
    return *std::launder(reinterpret_cast<Pool*>(storage));
}

} // namespace

void parallel_for(std::int64_t count, int threads, void (*body)(void*, std::int64_t), void* context) {
    Job job;
    job.count = count;
    job.body = body;
    job.context = context;
    job.others = int((threads < count ? threads : count) - 1);
    std::fegetenv(&job.mode);
    if (job.others > 0) {
        std::unique_lock<std::mutex> lock(pool().in_use, std::try_to_lock);
        if (lock.owns_lock()) {
            pool().run(job);
            return;
        }
    }
    job.work();
}

} // namespace ssiuu
