/* A stand-in for qrexec-client-vm that is as cheap as can be, so that it is not what is measured.
 *
 * It plays both ends of the call. The service's argument says what the far end would be, after the well-known ports:
 * 7 sends back what it gets (echo), 9 drops it (discard), 19 sends without end (chargen).
 *
 * Seen from its parent it behaves as the real one does: the socket or the two pipes become non-blocking as the data
 * phase begins, EOF is passed on, and the exit code is that of the service.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* As much as the real one moves at once. */
#define CHUNK 65536
#define EXIT_USAGE 2
#define EXIT_NO_SERVICE 127

static char buffer[CHUNK];

static void set_nonblock(int fd) {
    int flags = fcntl(fd, F_GETFL);
    if (flags >= 0)
        fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

static void wait_for(int fd, short events) {
    struct pollfd poller = {.fd = fd, .events = events};
    while (poll(&poller, 1, -1) < 0 && errno == EINTR)
        ;
}

/* 0 at EOF. A peer that is gone has nothing more to say either. */
static size_t read_some(int fd) {
    for (;;) {
        ssize_t count = read(fd, buffer, CHUNK);
        if (count >= 0)
            return (size_t)count;
        if (errno == EAGAIN)
            wait_for(fd, POLLIN);
        else if (errno != EINTR)
            return 0;
    }
}

/* False once nobody reads any more. */
static int write_all(int fd, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t count = write(fd, buffer + done, size - done);
        if (count >= 0)
            done += (size_t)count;
        else if (errno == EAGAIN)
            wait_for(fd, POLLOUT);
        else if (errno != EINTR)
            return 0;
    }
    return 1;
}

static void echo(int in, int out) {
    size_t size;
    while ((size = read_some(in)) > 0 && write_all(out, size))
        ;
}

static void discard(int in) {
    while (read_some(in) > 0)
        ;
}

static void chargen(int out) {
    memset(buffer, 'x', CHUNK);
    while (write_all(out, CHUNK))
        ;
}

int main(int argc, char **argv) {
    enum { BUFFER_SIZE = 256, NO_FILTER, USE_STDIN_SOCKET };
    static const struct option options[] = {
        {"buffer-size", required_argument, NULL, BUFFER_SIZE},
        {"filter-escape-chars-stdout", no_argument, NULL, 't'},
        {"filter-escape-chars-stderr", no_argument, NULL, 'T'},
        {"no-filter-escape-chars-stdout", no_argument, NULL, NO_FILTER},
        {"no-filter-escape-chars-stderr", no_argument, NULL, NO_FILTER},
        {"agent-socket", required_argument, NULL, 'a'},
        {"prefix-data", required_argument, NULL, 'p'},
        {"use-stdin-socket", no_argument, NULL, USE_STDIN_SOCKET},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    int in = 0, out = 1, option;
    while ((option = getopt_long(argc, argv, "+tTa:p:h", options, NULL)) != -1) {
        if (option == '?')
            return EXIT_USAGE;
        if (option == 'h')
            return 0;
        if (option == USE_STDIN_SOCKET)
            out = 0;
    }
    if (argc - optind < 2) {
        fprintf(stderr, "usage: %s [options] target_vmname program_ident\n", argv[0]);
        return EXIT_USAGE;
    }
    const char *argument = strchr(argv[optind + 1], '+');
    int port = argument ? atoi(argument + 1) : 0;

    signal(SIGPIPE, SIG_IGN);
    set_nonblock(in);
    set_nonblock(out);
    switch (port) {
    case 7:
        echo(in, out);
        break;
    case 9:
        discard(in);
        break;
    case 19:
        chargen(out);
        break;
    default:
        return EXIT_NO_SERVICE;
    }
    /* Whoever else holds the socket must not keep the peer from seeing the end. */
    if (shutdown(out, SHUT_WR) < 0 && errno == ENOTSOCK)
        close(out);
    return 0;
}
