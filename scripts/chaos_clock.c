// A wall clock that can be set, for the processes into which this is preloaded: scripts/chaos_machine.py.
//
// CPCR_CHAOS_CLOCK names a file of eight bytes, the offset in seconds. It is mapped, so that all processes see a step at
// once. Only the wall clock is another: monotonic clocks and files' times stay as they are. Not libfaketime: that one
// crashes where malloc is replaced (dlsym before the allocator is ready), as it is in these binaries. Linux, glibc 2.30.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const int64_t none;
static const volatile int64_t *offset_s = &none;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CPCR_CHAOS_CLOCK");
    int file = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) offset_s = mapped;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = (int)syscall(SYS_clock_gettime, clock, now);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset_s;
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    *now = (struct timeval){precise.tv_sec, precise.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *out) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (out != NULL) *out = precise.tv_sec;
    return precise.tv_sec;
}

static int before(const struct timespec *a, const struct timespec *b) {
    return a->tv_sec < b->tv_sec || (a->tv_sec == b->tv_sec && a->tv_nsec < b->tv_nsec);
}

// Waits until a date, as the kernel would: a clock set back makes the wait longer, one set forth ends it. It looks at the
// clock ten times a second for that.
int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    // So early was no date: the condition has the monotonic clock.
    if (until->tv_sec < 1000000000) return pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, until);
    for (;;) {
        struct timespec now, next;
        clock_gettime(CLOCK_REALTIME, &now);
        if (!before(&now, until)) {
            // With the status, and the mutex let go for a moment, of a wait that is over.
            next = (struct timespec){0, 0};
            return pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, &next);
        }
        clock_gettime(CLOCK_MONOTONIC, &next);
        int64_t left_ns = (until->tv_sec - now.tv_sec) * INT64_C(1000000000) + until->tv_nsec - now.tv_nsec;
        next.tv_nsec += left_ns < 100000000 ? left_ns : 100000000;
        next.tv_sec += next.tv_nsec / 1000000000;
        next.tv_nsec %= 1000000000;
        int status = pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, &next);
        if (status != ETIMEDOUT) return status;
    }
}
