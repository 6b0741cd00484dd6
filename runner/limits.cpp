#include "limits.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <new>

#include "errors.h"

namespace dreamedge {
namespace {

constexpr std::array<std::pair<int, const char*>, 5> CRASHES{
    {{SIGSEGV, "SIGSEGV"}, {SIGBUS, "SIGBUS"}, {SIGILL, "SIGILL"}, {SIGFPE, "SIGFPE"}, {SIGABRT, "SIGABRT"}}};

// Written before anything goes wrong: afterwards nothing can be allocated. stderr itself may be kept quiet then.
int to_user = STDERR_FILENO;
std::array<char, 400> name;

void say(const char* text) {
    size_t n = 0;
    while (text[n] != '\0') ++n;
    if (write(to_user, text, n) < 0) _exit(static_cast<int>(Exit::internal));
}

[[noreturn]] void ends(Exit code, const char* because, const char* detail = "") {
    static std::atomic_flag is_said = ATOMIC_FLAG_INIT;
    while (is_said.test_and_set()) pause();  // of several threads the first one says it
    say("error: ");
    say(name.data());
    say(because);
    say(detail);
    say("\n");
    _exit(static_cast<int>(code));
}

void on_signal(int number) {
    if (number == SIGALRM) {
        ends(Exit::artifact, ": the runtime hung: it took longer than a minute and what its size explains");
    }
    for (const auto& [crash, word] : CRASHES) {
        if (crash == number) ends(Exit::artifact, ": the runtime crashed while running it: ", word);
    }
}

}  // namespace

void end_in_words(const std::string& what) {
    std::snprintf(name.data(), name.size(), "%s", one_line(what, 300).c_str());
    to_user = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
    std::set_new_handler([] { ends(Exit::resource, ": too little memory: it takes more, or a higher memory=MIB"); });
    // On a stack of their own: one that overflowed is a crash too.
    static std::array<char, 1 << 16> stack;
    stack_t own{};
    own.ss_sp = stack.data(), own.ss_size = stack.size();
    sigaltstack(&own, nullptr);
    struct sigaction action {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK;
    sigaction(SIGALRM, &action, nullptr);
    for (const auto& [crash, word] : CRASHES) sigaction(crash, &action, nullptr);
}

void end_in(double seconds) {
    itimerval timer{};
    timer.it_value.tv_sec = static_cast<time_t>(seconds);
    setitimer(ITIMER_REAL, &timer, nullptr);
}

void limit_memory(int64_t n_bytes) {
    const auto most = static_cast<rlim_t>(n_bytes);
    rlimit limit{};
    getrlimit(RLIMIT_DATA, &limit);
    limit.rlim_cur = limit.rlim_max == RLIM_INFINITY || most < limit.rlim_max ? most : limit.rlim_max;
    if (setrlimit(RLIMIT_DATA, &limit) != 0) throw Error(Exit::resource, "memory: this limit cannot be set here");
}

}  // namespace dreamedge
