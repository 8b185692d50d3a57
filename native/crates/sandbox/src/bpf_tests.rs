use super::*;

/// What the kernel would do with the filter: the instructions that `compile` makes.
fn run(program: &[sock_filter], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(nr.to_le_bytes());
    data.extend(arch.to_le_bytes());
    data.extend(0u64.to_le_bytes());
    data.extend(args.iter().flat_map(|a| a.to_le_bytes()));
    let (mut a, mut pc) = (0u32, 0usize);
    loop {
        let i = &program[pc];
        pc += 1;
        let code = u32::from(i.code);
        let mut branch = |taken: bool| pc += usize::from(if taken { i.jt } else { i.jf });
        if code == BPF_LD | BPF_W | BPF_ABS {
            let at = i.k as usize;
            a = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
        } else if code == BPF_JMP | BPF_JEQ | BPF_K {
            branch(a == i.k);
        } else if code == BPF_JMP | BPF_JGE | BPF_K {
            branch(a >= i.k);
        } else if code == BPF_ALU | BPF_AND | BPF_K {
            a &= i.k;
        } else {
            assert_eq!(code, BPF_RET | BPF_K);
            return i.k;
        }
    }
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

fn fails(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

fn sample() -> Vec<sock_filter> {
    let rules = [
        Rule::always(7, Verdict::Allow),
        Rule::always(8, Verdict::Fail(libc::ENOSYS)),
        Rule {
            call: 9,
            verdict: Verdict::Allow,
            if_one_of: vec![Check::equals(1, 5), Check::lacks(2, 4)],
            otherwise: Verdict::Kill,
        },
        Rule::always(0x1_0000, Verdict::Allow),
        Rule {
            call: 11,
            verdict: Verdict::Kill,
            if_one_of: vec![Check::differs(0, 3)],
            otherwise: Verdict::Allow,
        },
    ];
    compile(&rules, Verdict::Fail(libc::EPERM))
}

#[test]
fn the_first_rule_for_a_call_decides() {
    let filter = sample();
    assert_eq!(run(&filter, ARCH, 7, [0; 6]), ALLOW);
    assert_eq!(run(&filter, ARCH, 8, [0; 6]), fails(libc::ENOSYS));
    assert_eq!(run(&filter, ARCH, 10, [0; 6]), fails(libc::EPERM));
    assert_eq!(run(&filter, ARCH, 0x1_0000, [0; 6]), ALLOW);
}

#[test]
fn one_check_that_holds_is_enough() {
    let filter = sample();
    for (args, expected) in [
        ([0, 5, 4, 0, 0, 0], ALLOW),
        ([0, 6, 3, 0, 0, 0], ALLOW),
        ([5, 6, 4, 0, 0, 0], KILL),
        ([5, 6, 12, 5, 5, 5], KILL),
        // The upper half of an int argument may hold anything.
        ([0, 0xdead_0000_0005, 4, 0, 0, 0], ALLOW),
    ] {
        assert_eq!(run(&filter, ARCH, 9, args), expected, "{args:?}");
    }
}

#[test]
fn a_check_can_ask_for_the_contrary() {
    let filter = sample();
    assert_eq!(run(&filter, ARCH, 11, [3, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(run(&filter, ARCH, 11, [4, 3, 0, 0, 0, 0]), KILL);
}

#[test]
fn foreign_architectures_and_abis_are_killed() {
    let filter = sample();
    assert_eq!(run(&filter, 0x4000_0003, 7, [0; 6]), KILL); // i386
    assert_eq!(run(&filter, ARCH ^ 1, 7, [0; 6]), KILL);
    #[cfg(target_arch = "x86_64")]
    {
        assert_eq!(run(&filter, ARCH, X32 | 7, [0; 6]), KILL);
        assert_eq!(run(&filter, ARCH, u32::MAX, [0; 6]), KILL);
    }
}

#[test]
fn the_filters_fit_into_what_the_kernel_takes() {
    // BPF_MAXINSNS; and all filters of a process together have at most 32768 (MAX_INSNS_PER_PATH).
    for filter in [
        crate::worker_calls::filter(1),
        crate::daemon_calls::filter(),
    ] {
        assert!(filter.len() <= 4096, "{} instructions", filter.len());
    }
}
