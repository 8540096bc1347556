/* One busy core, as another program of the qube keeps it; at normal priority. */

#include <signal.h>
#include <sys/prctl.h>

int main(void) {
    /* Not longer than the bench. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (volatile int on = 1; on;)
        ;
}
