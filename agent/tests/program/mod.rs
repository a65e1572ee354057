//! What the tests run: this very binary, told by an environment variable to be a hog, a burner or a bomb. So the
//! tests need nothing but themselves and the runner, also in a guest that has nothing else.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

/// Says what to be: a word and perhaps a number.
pub const VARIABLE: &str = "OPTIMUS_TEST_PROGRAM";

/// Before `main` and its threads, so that a fork is a fork of one thread and nothing of the test harness is printed.
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    let Ok(text) = std::env::var(VARIABLE) else { return };
    let (what, number) = text.split_once(' ').unwrap_or((&text, "0"));
    let number: usize = number.parse().unwrap();
    match what {
        "hog" => hog(number),
        "child-hog" => child_hog(number),
        "burn" => burn(number),
        "bomb" => bomb(),
        "escape" => escape(number),
        "comet" => comet(number),
        "headless" => headless(),
        "sleep" => sleep(),
        other => panic!("no program `{other}`"),
    }
    std::process::exit(0);
}

fn sleep() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(1000));
    }
}

/// Touches so many bytes, says so, and stays.
fn hog(bytes: usize) -> ! {
    let mut held = Vec::new();
    for _ in 0..bytes >> 20 {
        held.push(vec![1u8; 1 << 20]);
    }
    println!("holding {} MiB", held.len());
    sleep()
}

/// A hog as a child; says how the child ended and ends well itself.
fn child_hog(bytes: usize) {
    // SAFETY: one thread.
    match unsafe { libc::fork() } {
        0 => hog(bytes),
        pid => {
            let mut status = 0;
            // SAFETY: our child, our variable.
            unsafe { libc::waitpid(pid, &mut status, 0) };
            println!("child ended by signal {}", libc::WTERMSIG(status));
        }
    }
}

/// So many threads that never rest.
fn burn(threads: usize) -> ! {
    for _ in 1..threads {
        std::thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    loop {
        std::hint::spin_loop();
    }
}

/// Every process of it forks for ever; one that may not says so and tries again.
fn bomb() -> ! {
    let mut told = false;
    loop {
        // SAFETY: one thread.
        if unsafe { libc::fork() } < 0 {
            if !told {
                told = true;
                println!("fork refused");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Grandchildren in sessions of their own, whose parents are gone.
fn escape(children: usize) -> ! {
    for _ in 0..children {
        // SAFETY: one thread, each time.
        unsafe {
            if libc::fork() == 0 {
                libc::setsid();
                if libc::fork() == 0 {
                    libc::setsid();
                    sleep();
                }
                libc::_exit(0);
            }
        }
    }
    println!("escaped");
    sleep()
}

/// A process that is always another one: it forks and leaves, and so do its children, up to so many times.
fn comet(times: usize) -> ! {
    println!("flying");
    // SAFETY: one thread.
    if unsafe { libc::fork() } != 0 {
        sleep();
    }
    for _ in 0..times {
        // SAFETY: one thread.
        if unsafe { libc::fork() } != 0 {
            // SAFETY: ends this process.
            unsafe { libc::_exit(0) };
        }
    }
    sleep()
}

/// A program whose first thread has left: its state says zombie, yet it runs.
fn headless() -> ! {
    std::thread::spawn(|| {
        println!("headless");
        sleep()
    });
    loop {
        // SAFETY: ends this thread only.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
}
