# Counts a time in a histogram in shared memory. Buckets and their bounds: stats/histogram.py.

from libc.stdint cimport uint64_t

from gpooler.relay.counters cimport HISTOGRAM_BUCKETS


cdef extern from *:
    int leading_zeros "__builtin_clzll"(unsigned long long value) nogil


cdef inline unsigned int bucket_of(uint64_t us) noexcept nogil:
    """The bucket that counts a time: two for each power of two."""
    cdef unsigned int power, bucket
    if us < 2:
        return <unsigned int> us
    power = 63 - leading_zeros(us)
    bucket = 2 * power + <unsigned int> ((us >> (power - 1)) & 1)
    return bucket if bucket < HISTOGRAM_BUCKETS else HISTOGRAM_BUCKETS - 1


cdef inline void observe(uint64_t* histogram, uint64_t us) noexcept nogil:
    """For the histogram's one writer."""
    histogram[bucket_of(us)] += 1
