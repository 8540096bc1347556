/* The load: what a client of a listener does, in C, so that it is not what is measured.
 *
 * usage: load first  HOST PORT COUNT               connections one after the other, each timed to its first byte
 *        load rate   HOST PORT AT_ONCE SECONDS     connections, so many at once, from connect to close
 *        load stream HOST PORT to|from|both STREAMS SECONDS
 *        load hold   PORT COUNT HOST...            open connections in turn, keep them until stdin ends
 *
 * PORT leads to echo, except that of `stream to` (discard) and `stream from` (chargen). The result is one line of JSON
 * on stdout. `stream` says "ready" when its streams are open and starts when a line comes on stdin; its connections
 * last until stdin ends, so that the processes that carry them can be looked at. Times are in nanoseconds.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/sockios.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (256 * 1024)
/* What is measured after start-up has passed. */
#define WARM_UP 100000000
/* Connections that are still open at the end have so long to finish. */
#define DRAIN 2000000000
/* No run is longer; whatever hangs, ends. */
#define PATIENCE 60

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void pause_ns(int64_t duration) {
    struct timespec time = {.tv_sec = duration / 1000000000, .tv_nsec = duration % 1000000000};
    nanosleep(&time, NULL);
}

static struct sockaddr_in address_of(const char *host, const char *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(port))};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        fprintf(stderr, "not an IPv4 address: %s\n", host);
        exit(2);
    }
    return address;
}

static int open_socket(int flags) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0)
        fail("socket");
    return fd;
}

static int connect_to(const struct sockaddr_in *address) {
    int fd = open_socket(0);
    if (connect(fd, (const struct sockaddr *)address, sizeof *address) < 0)
        fail("connect");
    return fd;
}

/* One byte there and back. */
static int ping(int fd) {
    char byte = 'x';
    return send(fd, &byte, 1, MSG_NOSIGNAL) == 1 && recv(fd, &byte, 1, 0) == 1;
}

static int compare(const void *one, const void *other) {
    int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
    return (a > b) - (a < b);
}

/* The nearest-rank percentile of sorted values. */
static int64_t percentile(const int64_t *sorted, size_t count, int percent) {
    size_t rank = (count * (size_t)percent + 99) / 100;
    return count ? sorted[rank ? rank - 1 : 0] : 0;
}

/* ------------------------------------------------------------------ first */

static int first(const struct sockaddr_in *address, size_t count) {
    int64_t *took = calloc(count, sizeof *took);
    if (!took)
        fail("calloc");
    for (size_t i = 0; i < count; i++) {
        int64_t began = now();
        int fd = connect_to(address);
        if (!ping(fd))
            fail("no answer");
        took[i] = now() - began;
        /* The next one starts when this one is over. */
        char byte;
        shutdown(fd, SHUT_WR);
        while (recv(fd, &byte, 1, 0) > 0)
            ;
        close(fd);
    }
    qsort(took, count, sizeof *took, compare);
    printf("{\"count\": %zu, \"p50\": %" PRId64 ", \"p99\": %" PRId64 ", \"max\": %" PRId64 "}\n", count,
           percentile(took, count, 50), percentile(took, count, 99), took[count - 1]);
    return 0;
}

/* ------------------------------------------------------------------ rate */

enum stage { CONNECTING, WAITING, CLOSING };

struct one {
    int fd;
    enum stage stage;
    int64_t began;
};

static void begin(struct one *one, int epoll, const struct sockaddr_in *address) {
    one->fd = open_socket(SOCK_NONBLOCK);
    one->stage = CONNECTING;
    one->began = now();
    if (connect(one->fd, (const struct sockaddr *)address, sizeof *address) < 0 && errno != EINPROGRESS)
        fail("connect");
    struct epoll_event event = {.events = EPOLLOUT, .data.ptr = one};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, one->fd, &event) < 0)
        fail("epoll_ctl");
}

static int rate(const struct sockaddr_in *address, size_t at_once, int64_t duration) {
    struct one *all = calloc(at_once, sizeof *all);
    size_t room = 1 << 16, firsts = 0;
    int64_t *took = calloc(room, sizeof *took);
    if (!all || !took)
        fail("calloc");
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    /* Counted is from when each has had its turn on, and until as many have been served: who starts all of them before
     * it serves one would have none at all in a short time. */
    int64_t warm = now() + WARM_UP, start = 0, end = 0;
    size_t open = 0, served = 0, failed = 0, ended = 0;
    for (; open < at_once; open++)
        begin(&all[open], epoll, address);

    while (open > 0 && (!end || now() < end + DRAIN)) {
        struct epoll_event events[64];
        int ready = epoll_wait(epoll, events, 64, 10);
        int64_t time = now();
        if (!start && time >= warm && (ended >= at_once || time >= warm + DRAIN))
            start = time;
        if (start && !end && time >= start + duration && (served >= at_once || time >= start + duration + DRAIN))
            end = time;
        int counts = start && !end;
        for (int i = 0; i < ready; i++) {
            struct one *one = events[i].data.ptr;
            struct epoll_event event = {.events = EPOLLIN, .data.ptr = one};
            char byte = 'x';
            ssize_t count;
            switch (one->stage) {
            case CONNECTING:
                if (send(one->fd, &byte, 1, MSG_NOSIGNAL) == 1) {
                    one->stage = WAITING;
                    epoll_ctl(epoll, EPOLL_CTL_MOD, one->fd, &event);
                    continue;
                }
                break;
            case WAITING:
                count = recv(one->fd, &byte, 1, 0);
                if (count < 0 && errno == EAGAIN)
                    continue;
                if (count == 1) {
                    if (counts && firsts < room)
                        took[firsts++] = time - one->began;
                    one->stage = CLOSING;
                    shutdown(one->fd, SHUT_WR);
                    continue;
                }
                break;
            case CLOSING:
                count = recv(one->fd, &byte, 1, 0);
                if (count < 0 && errno == EAGAIN)
                    continue;
                if (count == 0) {
                    served += (size_t)counts;
                    close(one->fd);
                    one->fd = -1;
                }
                break;
            }
            if (one->fd >= 0) {
                failed++;
                close(one->fd);
            }
            ended++;
            if (!end)
                begin(one, epoll, address);
            else
                open--;
        }
    }
    qsort(took, firsts, sizeof *took, compare);
    printf("{\"served\": %zu, \"failed\": %zu, \"unfinished\": %zu, \"seconds\": %.6f, \"p50\": %" PRId64
           ", \"p99\": %" PRId64 "}\n",
           served, failed, open, (double)(end - start) / 1e9, percentile(took, firsts, 50), percentile(took, firsts, 99));
    return 0;
}

/* ------------------------------------------------------------------ stream */

static atomic_bool over;

struct way {
    int fd;
    uint64_t bytes;
    pthread_t thread;
};

static void *write_on(void *argument) {
    struct way *way = argument;
    char *buffer = calloc(1, CHUNK);
    while (buffer && !atomic_load_explicit(&over, memory_order_relaxed)) {
        ssize_t count = send(way->fd, buffer, CHUNK, MSG_NOSIGNAL);
        if (count <= 0)
            break;
        way->bytes += (uint64_t)count;
    }
    return NULL;
}

static void *read_on(void *argument) {
    struct way *way = argument;
    char *buffer = malloc(CHUNK);
    while (buffer && !atomic_load_explicit(&over, memory_order_relaxed)) {
        ssize_t count = recv(way->fd, buffer, CHUNK, 0);
        if (count <= 0)
            break;
        way->bytes += (uint64_t)count;
    }
    return NULL;
}

static int stream(const struct sockaddr_in *address, const char *which, size_t streams, int64_t duration) {
    int writes = strcmp(which, "from") != 0, reads = strcmp(which, "to") != 0;
    struct way *writers = calloc(streams, sizeof *writers), *readers = calloc(streams, sizeof *readers);
    if (!writers || !readers)
        fail("calloc");
    for (size_t i = 0; i < streams; i++) {
        int fd = connect_to(address);
        char byte;
        writers[i].fd = readers[i].fd = fd;
        if (writes && reads && !ping(fd))
            fail("no answer");
        if (!writes && recv(fd, &byte, 1, MSG_PEEK) != 1)
            fail("no bytes");
        /* A stalled relay must not keep the threads from seeing that it is over. */
        struct timeval patience = {.tv_usec = 200000};
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    }
    if (!reads)
        /* Nothing comes back that would say that it is open. */
        pause_ns(100000000);
    char line[16];
    printf("ready\n");
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin))
        return 0;

    int64_t began = now();
    for (size_t i = 0; i < streams; i++) {
        if (writes && pthread_create(&writers[i].thread, NULL, write_on, &writers[i]) != 0)
            fail("pthread_create");
        if (reads && pthread_create(&readers[i].thread, NULL, read_on, &readers[i]) != 0)
            fail("pthread_create");
    }
    pause_ns(duration);
    atomic_store(&over, 1);
    int64_t took = now() - began;
    uint64_t bytes = 0;
    for (size_t i = 0; i < streams; i++) {
        if (writes)
            pthread_join(writers[i].thread, NULL);
        if (reads)
            pthread_join(readers[i].thread, NULL);
        /* Where nothing comes back, what still waits here has not gone anywhere. */
        int waiting = 0;
        if (!reads && ioctl(writers[i].fd, SIOCOUTQ, &waiting) == 0)
            bytes -= (uint64_t)waiting;
        bytes += reads ? readers[i].bytes : writers[i].bytes;
    }
    printf("{\"bytes\": %" PRIu64 ", \"seconds\": %.6f}\n", bytes, (double)took / 1e9);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin))
        ;
    return 0;
}

/* ------------------------------------------------------------------ hold */

static int hold(const char *port, size_t count, char **hosts, size_t number) {
    for (size_t i = 0; i < count; i++) {
        struct sockaddr_in address = address_of(hosts[i % number], port);
        if (!ping(connect_to(&address)))
            fail("no answer");
    }
    printf("{\"open\": %zu}\n", count);
    fflush(stdout);
    char line[16];
    while (fgets(line, sizeof line, stdin))
        ;
    return 0;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    alarm(PATIENCE);
    if (!strcmp(what, "hold") && argc > 4)
        return hold(argv[2], strtoul(argv[3], NULL, 10), argv + 4, (size_t)argc - 4);
    if (argc > 4) {
        struct sockaddr_in address = address_of(argv[2], argv[3]);
        if (!strcmp(what, "first"))
            return first(&address, strtoul(argv[4], NULL, 10));
        if (!strcmp(what, "rate") && argc > 5)
            return rate(&address, strtoul(argv[4], NULL, 10), (int64_t)(strtod(argv[5], NULL) * 1e9));
        if (!strcmp(what, "stream") && argc > 6)
            return stream(&address, argv[4], strtoul(argv[5], NULL, 10), (int64_t)(strtod(argv[6], NULL) * 1e9));
    }
    fprintf(stderr, "usage: load first|rate|stream|hold ...: see the top of load.c\n");
    return 2;
}
