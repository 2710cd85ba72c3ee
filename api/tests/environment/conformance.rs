//! What every implementation of [`Environment`] must do, whatever isolates it. Each function is one test; [`on_backend`]
//! runs them all for one backend. Inside an environment they want a POSIX shell with coreutils, procps-free, and perl.
use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use carrel_agent::wire::ProcessSpec;
use carrel_api::{
    environment::{
        Create, Environment, EnvironmentError, Observed, Phase,
        link::{Exit, Link, LinkError, Links, Process, exit},
    },
    exam::EnvironmentSpec,
    identity::{EnvironmentId, SessionId, UserId},
};
use tokio::time::{Instant, timeout};

/// How long an environment may take to be ready here: an exam's candidates get 60 s.
pub const READY: Duration = Duration::from_secs(60);
/// Nothing is left within this: what resists is killed.
const GONE: Duration = Duration::from_secs(60);
/// A failure is visible within this.
const VISIBLE: Duration = Duration::from_secs(10);

/// One backend, as the tests need it.
#[async_trait]
pub trait Backend: Send + Sync {
    /// The implementation.
    fn environment(&self) -> Arc<dyn Environment>;
    /// The server stops and starts anew: everything that only it remembered is gone.
    async fn restart(&mut self);
    /// Ends an environment's first process from outside, as a fault would.
    async fn kill(&self, id: EnvironmentId);
    /// Everything that there still is of an environment: processes, mounts, files, pods.
    async fn remains(&self, id: EnvironmentId) -> Vec<String>;
    /// Paths of the server that no candidate may see.
    fn secrets(&self) -> Vec<PathBuf>;
}

/// Makes one test of each function for the backend that an expression opens.
#[macro_export]
macro_rules! on_backend {
    ($open:expr; $($name:ident),* $(,)?) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let Some(mut backend) = $open.await else { return };
            $crate::conformance::$name(&mut backend).await;
            backend.close().await;
        })*
    };
}

/// An environment that a test made, with a link to it.
pub struct Room {
    pub id: EnvironmentId,
    pub links: Arc<Links>,
}

/// What a command did.
#[derive(Debug)]
pub struct Done {
    pub exit: Exit,
    pub out: Vec<u8>,
    pub err: Vec<u8>,
}

impl Done {
    /// stdout of a command that must have succeeded, without its last newline.
    pub fn ok(self) -> String {
        let text = String::from_utf8_lossy(&self.out).trim_end().to_owned();
        assert_eq!(self.exit, Exit::Code(0), "out: {text}\nerr: {}", String::from_utf8_lossy(&self.err));
        text
    }
}

pub fn create_request(spec: EnvironmentSpec) -> Create {
    Create {
        environment_id: EnvironmentId::new(),
        owner: Some((UserId::new(), SessionId::new())),
        exam_id: "conformance".into(),
        spec,
        lifetime_seconds: 600,
    }
}

impl Room {
    pub async fn open(backend: &dyn Backend, spec: EnvironmentSpec) -> Self {
        let request = create_request(spec);
        backend.environment().create(&request).await.unwrap();
        let room = Self::of(backend, request.environment_id);
        room.ready().await;
        room
    }

    pub async fn usual(backend: &dyn Backend) -> Self {
        Self::open(backend, EnvironmentSpec::default()).await
    }

    /// One that is there.
    pub fn of(backend: &dyn Backend, id: EnvironmentId) -> Self {
        Self { id, links: Links::new(backend.environment()) }
    }

    /// Another server's way to the same environment.
    pub fn again(&self, backend: &dyn Backend) -> Self {
        Self::of(backend, self.id)
    }

    pub async fn link(&self) -> Arc<Link> {
        self.links.get(self.id).await.unwrap()
    }

    /// Ready means that the agent answers.
    pub async fn ready(&self) {
        let deadline = Instant::now() + READY;
        loop {
            let answer = match self.links.get(self.id).await {
                Ok(link) => link.health().await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(_) => return,
                Err(error) => assert!(Instant::now() < deadline, "not ready: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    pub async fn start(&self, command: &str) -> Process {
        self.link().await.start(Some(command.as_bytes()), &ProcessSpec::default()).await.unwrap()
    }

    pub async fn run(&self, command: &str) -> Done {
        self.run_with(command, Bytes::new()).await
    }

    pub async fn run_with(&self, command: &str, input: Bytes) -> Done {
        let Process { mut stdin, mut stdout, stderr, .. } = self.start(command).await;
        let mut stderr = stderr.unwrap();
        let work = async {
            let feed = async {
                // A command that does not read its input may end first.
                let _ = stdin.write(input).await;
                stdin.finish();
            };
            let out = async {
                let mut out = Vec::new();
                while let Some(bytes) = stdout.read().await.unwrap() {
                    out.extend_from_slice(&bytes);
                }
                (out, exit(&mut stdout).await)
            };
            let err = async {
                let mut err = Vec::new();
                while let Some(bytes) = stderr.read().await.unwrap() {
                    err.extend_from_slice(&bytes);
                }
                err
            };
            let ((), (out, exit), err) = tokio::join!(feed, out, err);
            Done { exit, out, err }
        };
        timeout(Duration::from_secs(60), work)
            .await
            .unwrap_or_else(|_| panic!("no end after 60 s: {command}"))
    }

    /// stdout of a command that must succeed.
    pub async fn text(&self, command: &str) -> String {
        self.run(command).await.ok()
    }

    /// Runs commands that must all fail.
    pub async fn refused(&self, commands: &[&str]) {
        for command in commands {
            let done = self.run(command).await;
            assert!(matches!(done.exit, Exit::Code(1..)), "{command}: {done:?}");
        }
    }
}

/// Waits until an environment is seen as wanted, which is for what has happened to it.
pub async fn seen(
    backend: &dyn Backend,
    id: EnvironmentId,
    wanted: impl Fn(Option<&Observed>) -> bool,
) -> Option<Observed> {
    seen_within(VISIBLE, backend, id, wanted).await
}

/// Waits until a new environment, which starts as slowly as the machine is busy, is seen as up.
pub async fn seen_up(backend: &dyn Backend, id: EnvironmentId) -> Observed {
    seen_within(READY, backend, id, is_up).await.unwrap()
}

pub async fn seen_within(
    limit: Duration,
    backend: &dyn Backend,
    id: EnvironmentId,
    wanted: impl Fn(Option<&Observed>) -> bool,
) -> Option<Observed> {
    let mut observation = backend.environment().observe();
    let result = timeout(limit, async {
        loop {
            {
                let now = observation.borrow_and_update();
                if now.complete && wanted(now.environments.get(&id)) {
                    return now.environments.get(&id).cloned();
                }
            }
            observation.changed().await.unwrap();
        }
    })
    .await;
    result
        .unwrap_or_else(|_| panic!("seen after {limit:?}: {:?}", observation.borrow().environments.get(&id)))
}

fn is_up(observed: Option<&Observed>) -> bool {
    observed.is_some_and(|observed| observed.phase == Phase::Up)
}

pub fn has_failed(observed: Option<&Observed>) -> bool {
    observed.is_some_and(|observed| matches!(observed.phase, Phase::Failed(_)))
}

pub async fn creating_twice_is_one_environment(backend: &mut impl Backend) {
    let request = create_request(EnvironmentSpec::default());
    let environment = backend.environment();
    let (one, two) = tokio::join!(environment.create(&request), environment.create(&request));
    one.unwrap();
    two.unwrap();
    let room = Room { id: request.environment_id, links: Links::new(environment.clone()) };
    room.ready().await;
    room.text("echo mine > ~/file").await;
    environment.create(&request).await.unwrap();
    // Past the shared connection: another one would lead to the second environment, if there were one.
    assert_eq!(room.again(backend).text("cat ~/file").await, "mine");
    seen_up(backend, room.id).await;
    let observed = environment.inspect(room.id).await.unwrap().unwrap();
    assert_eq!((observed.phase, observed.owner), (Phase::Up, request.owner.map(|(_, session)| session)));
    assert_eq!(environment.observe().borrow().environments.len(), 1);
}

pub async fn many_can_be_made_at_once(backend: &mut impl Backend) {
    let rooms = futures_util::future::join_all((0..20).map(|_| Room::usual(&*backend))).await;
    for room in &rooms {
        room.text(&format!("echo {} > ~/name", room.id)).await;
    }
    for room in &rooms {
        assert_eq!(room.text("cat ~/name").await, room.id.to_string());
    }
    let environment = backend.environment();
    let ends = futures_util::future::join_all(rooms.iter().map(|room| environment.destroy(room.id))).await;
    assert!(ends.iter().all(Result::is_ok), "{ends:?}");
}

pub async fn one_without_an_owner_is_given_one(backend: &mut impl Backend) {
    let request = Create { owner: None, ..create_request(EnvironmentSpec::default()) };
    let environment = backend.environment();
    environment.create(&request).await.unwrap();
    assert_eq!(seen_up(backend, request.environment_id).await.owner, None);
    let owner = (UserId::new(), SessionId::new());
    environment.adopt(request.environment_id, owner).await.unwrap();
    environment.adopt(request.environment_id, owner).await.unwrap();
    let adopted = |observed: Option<&Observed>| observed.is_some_and(|seen| seen.owner == Some(owner.1));
    assert_eq!(seen(backend, request.environment_id, adopted).await.unwrap().phase, Phase::Up);
    let unknown = environment.adopt(EnvironmentId::new(), owner).await;
    assert!(matches!(unknown, Err(EnvironmentError::NotFound)), "{unknown:?}");
}

pub async fn every_exit_status_comes_back_exactly(backend: &mut impl Backend) {
    let room = Room::usual(backend).await;
    for code in 0..=255u8 {
        assert_eq!(room.run(&format!("exit {code}")).await.exit, Exit::Code(code));
    }
    for (name, status) in [("TERM", 143), ("KILL", 137), ("HUP", 129), ("SEGV", 139)] {
        let done = room.run(&format!("kill -{name} $$")).await;
        assert_eq!(done.exit, Exit::Signal { name: name.into(), out_of_memory: false });
        assert_eq!(done.exit.status(), status);
    }
    assert_eq!(room.run("no-such-command").await.exit, Exit::Code(127));
}

pub async fn bytes_come_back_unchanged_and_apart(backend: &mut impl Backend) {
    let room = Room::usual(backend).await;
    // What shrinks and what does not, in runs of all lengths: a link may compress.
    let noise =
        (0..4_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes().into_iter().take(1));
    let mixed = (0..40_000usize).flat_map(|n| format!("{n} {}\n", "ab".repeat(n % 97)).into_bytes());
    let bytes: Bytes = noise.chain(vec![0; 1_000_000]).chain(mixed).collect::<Vec<u8>>().into();
    let done = room.run_with("cat", bytes.clone()).await;
    assert_eq!(done.exit, Exit::Code(0));
    assert!(done.out == bytes, "{} of {} bytes came back, or others", done.out.len(), bytes.len());
    let done = room.run("echo out; echo err >&2; exit 3").await;
    assert_eq!(
        (done.out.as_slice(), done.err.as_slice(), done.exit),
        (b"out\n".as_slice(), b"err\n".as_slice(), Exit::Code(3))
    );
}

pub async fn variables_and_the_home_directory_are_as_promised(backend: &mut impl Backend) {
    let spec = EnvironmentSpec {
        env: [("EXAM_TOPIC".into(), "two words".into())].into(),
        ..EnvironmentSpec::default()
    };
    let room = Room::open(backend, spec).await;
    assert_eq!(room.text("echo \"$EXAM_TOPIC\"").await, "two words");
    assert_eq!(
        room.text(
            "test \"$PWD\" = \"$HOME\" && test -O \"$HOME\" && test \"$USER\" = \"$LOGNAME\" && id -un"
        )
        .await,
        room.text("echo $USER").await
    );
    // Only what is promised, and what a shell sets itself.
    let names = room.text("env | cut -d= -f1 | sort").await;
    let allowed =
        ["EXAM_TOPIC", "HOME", "LOGNAME", "PATH", "PWD", "SHELL", "SHLVL", "USER", "_", "LANG", "OLDPWD"];
    for name in names.lines() {
        assert!(allowed.contains(&name), "{name} came from somewhere");
    }
}

pub async fn two_environments_share_nothing(backend: &mut impl Backend) {
    let (a, b) = (Room::usual(backend).await, Room::usual(backend).await);
    for path in ["~/shared", "/tmp/shared", "/dev/shm/shared"] {
        a.text(&format!("echo a > {path}")).await;
        b.refused(&[&format!("cat {path}")]).await;
    }
    // A loopback port, an abstract socket and a System V queue of a's.
    let mut listener = a
        .start(
            r#"exec perl -MSocket -e '
            $| = 1;
            socket($t, AF_INET, SOCK_STREAM, 0) && bind($t, pack_sockaddr_in(4242, INADDR_LOOPBACK)) && listen($t, 5) or die;
            socket($u, AF_UNIX, SOCK_STREAM, 0) && bind($u, pack_sockaddr_un("\0carrel-shared")) && listen($u, 5) or die;
            defined msgget(4242, 01600) or die;
            print "here\n";
            while (accept($c, $t)) { print $c "a\n"; close $c }'"#,
        )
        .await;
    assert_eq!(listener.stdout.read().await.unwrap().unwrap().as_ref(), b"here\n");
    let probes = [
        r#"perl -MSocket -e 'socket($t, AF_INET, SOCK_STREAM, 0); connect($t, pack_sockaddr_in(4242, INADDR_LOOPBACK)) or exit 1'"#,
        r#"perl -MSocket -e 'socket($u, AF_UNIX, SOCK_STREAM, 0); connect($u, pack_sockaddr_un("\0carrel-shared")) or exit 1'"#,
        r#"perl -e 'defined msgget(4242, 0) or exit 1'"#,
    ];
    for probe in probes {
        a.text(probe).await;
        b.refused(&[probe]).await;
    }
    let (_outbound, mut inbound) = a.link().await.tcp(4242).await.unwrap();
    assert_eq!(inbound.read().await.unwrap().unwrap().as_ref(), b"a\n");
    assert!(matches!(b.link().await.tcp(4242).await, Err(LinkError::Refused(_))));
    // b cannot see a's processes, and a signal to everything it can reach does not reach them.
    b.refused(&["grep -l carrel-share[d] /proc/[0-9]*/cmdline"]).await;
    // It may take the program that carries the stream with it: its own end is not asked for.
    let mut killer = b.start("kill -KILL -1").await;
    while let Ok(Some(_)) = killer.stdout.read().await {}
    a.text("perl -MSocket -e 'socket($t, AF_INET, SOCK_STREAM, 0); connect($t, pack_sockaddr_in(4242, INADDR_LOOPBACK)) or exit 1'").await;
    b.ready().await;
}

pub async fn the_system_is_read_only(backend: &mut impl Backend) {
    let room = Room::usual(backend).await;
    for directory in [
        "/",
        "/usr",
        "/usr/bin",
        "/usr/local/bin",
        "/bin",
        "/lib",
        "/etc",
        "/var",
        "/run",
        "/dev",
        "/home",
        "/proc/sys/kernel",
    ] {
        room.refused(&[&format!("touch {directory}/carrel-test")]).await;
    }
    room.refused(&[
        "echo root::0:0::/:/bin/sh >> /etc/passwd",
        "rm -f /usr/bin/env",
        "cat /etc/shadow",
        "ls /root",
        "ls /etc/ssh",
        "echo b > /proc/sysrq-trigger",
        "head -c 1 /proc/kcore",
        "mount -t tmpfs none /tmp",
        "mount -o remount,rw /usr",
        "mknod ~/device b 8 0",
    ])
    .await;
    // Everything that can be written to has a bound of its own.
    let unbounded = "awk '$3 == \"tmpfs\" && $4 ~ /(^|,)rw(,|$)/ && $4 !~ /size=/' /proc/mounts";
    assert_eq!(room.text(unbounded).await, "");
}

pub async fn no_privilege_can_be_had(backend: &mut impl Backend) {
    let room = Room::usual(backend).await;
    let status = room
        .text("grep -E '^(Cap|NoNewPrivs|Uid)' /proc/self/status; grep -E '^(Cap|NoNewPrivs)' /proc/1/status")
        .await;
    for line in status.lines() {
        let (name, value) = line.split_once(':').unwrap();
        match name {
            "NoNewPrivs" => assert_eq!(value.trim(), "1"),
            "Uid" => assert!(value.split_whitespace().all(|uid| uid != "0"), "{line}"),
            _ => assert_eq!(u64::from_str_radix(value.trim(), 16).unwrap(), 0, "{line}"),
        }
    }
    room.refused(&[
        "unshare --user true",
        "unshare --mount true",
        "unshare --user --map-root-user true",
        "chroot / true",
    ])
    .await;
    // Whatever is setuid here does not make anybody root.
    let probe =
        r#"perl -e 'for (glob "/usr/bin/* /usr/sbin/* /usr/lib/*/*") { print "$_\n" if -u $_ }' | head -3"#;
    for program in room.text(probe).await.lines() {
        let done = room
            .run(&format!(
                "({program} </dev/null >/dev/null 2>&1 & p=$!; grep ^Uid /proc/$p/status; kill -9 $p; true)"
            ))
            .await;
        let seen = String::from_utf8_lossy(&done.out).into_owned();
        assert!(!seen.split_whitespace().skip(1).any(|uid| uid == "0"), "{program}: {seen}");
    }
}

pub async fn storage_has_its_limit(backend: &mut impl Backend) {
    const LIMIT: u64 = 16 << 20;
    let room =
        Room::open(backend, EnvironmentSpec { storage: Some(LIMIT), ..EnvironmentSpec::default() }).await;
    room.text("head -c 12M /dev/zero > ~/fits && rm ~/fits").await;
    room.refused(&["for n in 1 2 3 4; do head -c 8M /dev/zero > ~/file$n || exit 1; done"]).await;
    let used: u64 = room.text("du -sb ~ | cut -f1").await.parse().unwrap();
    assert!((LIMIT / 2..=LIMIT + 4096).contains(&used), "{used} bytes of {LIMIT}");
    // A full home is no reason not to be able to tidy up.
    room.text("rm ~/file* && echo again > ~/file").await;
    room.refused(&["for n in 1 2 3 4; do head -c 8M /dev/zero > /tmp/file$n || exit 1; done"]).await;
    room.refused(&["for n in 1 2 3 4; do head -c 8M /dev/zero > /dev/shm/file$n || exit 1; done"]).await;
}

pub async fn processes_have_their_limit_and_a_fork_bomb_ends_with_it(backend: &mut impl Backend) {
    const LIMIT: usize = 48;
    let spec = EnvironmentSpec { processes: Some(LIMIT as u32), ..EnvironmentSpec::default() };
    let (room, beside) = (Room::open(backend, spec).await, Room::usual(backend).await);
    // Counts with what a shell has built in: once the bomb burns, nothing more can be started.
    let count = "while :; do n=0; for p in /proc/[0-9]*; do n=$((n+1)); done; echo $n; done";
    let mut counter = room.start(count).await;
    let bomb = room.start("b() { b | b & }; b; sleep 1000").await;
    let forks = "perl -e 'while (1) { if (!defined fork) { last } } sleep 1000' & exec sleep 1000";
    // The bomb may have taken the last place: then the agent says so, and lives.
    let line = room.link().await.start(Some(forks.as_bytes()), &ProcessSpec::default()).await;
    assert!(matches!(line, Ok(_) | Err(LinkError::Refused(_))));
    let mut most = 0;
    let deadline = Instant::now() + Duration::from_secs(3);
    while Instant::now() < deadline {
        let text = timeout(Duration::from_secs(10), counter.stdout.read()).await.unwrap().unwrap().unwrap();
        let text = String::from_utf8_lossy(&text).into_owned();
        most = text.lines().filter_map(|line| line.parse().ok()).fold(most, usize::max);
    }
    assert_eq!(beside.text("echo well").await, "well");
    // Processes that are counted while they end are allowed for.
    assert!((LIMIT / 2..=LIMIT + 8).contains(&most), "{most} processes");
    room.link().await.health().await.unwrap();
    drop((bomb, line, counter));
    backend.environment().destroy(room.id).await.unwrap();
    assert_eq!(backend.remains(room.id).await, Vec::<String>::new());
    assert_eq!(beside.text("echo well").await, "well");
}

pub async fn memory_has_its_limit(backend: &mut impl Backend) {
    let spec = EnvironmentSpec { memory: Some(128 << 20), ..EnvironmentSpec::default() };
    let room = Room::open(backend, spec).await;
    room.text("perl -e '$x = \"x\" x (32 << 20)'").await;
    let done = room.run("perl -e '$x = \"x\" x (400 << 20); print \"had it\"'").await;
    assert_ne!(done.exit, Exit::Code(0));
    assert_eq!(done.out, b"");
    room.link().await.health().await.unwrap();
}

pub async fn nothing_of_the_server_is_visible(backend: &mut impl Backend) {
    let room = Room::usual(backend).await;
    for path in backend.secrets() {
        let path = path.display().to_string();
        room.refused(&[&format!("ls -d '{path}'")]).await;
        room.refused(&[&format!(
            "grep -F '{path}' /proc/1/mountinfo /proc/1/environ /proc/1/cmdline /proc/self/mountinfo"
        )])
        .await;
    }
    let names = room.text("tr '\\0' '\\n' < /proc/1/environ | cut -d= -f1").await;
    for name in names.lines() {
        assert!(
            !name.starts_with("CARGO") && !name.starts_with("RUST") && !name.contains("SECRET"),
            "{name}"
        );
    }
    // Every process there is is of this environment: the agent is the first, and few are beside it.
    let count: usize =
        room.text("n=0; for p in /proc/[0-9]*; do n=$((n+1)); done; echo $n").await.parse().unwrap();
    assert!(count <= 4, "{count} processes");
    assert_eq!(room.text("cat /proc/1/stat | cut -d' ' -f4").await, "0");
    // A command holds its three streams and nothing of the agent's or the server's.
    let open =
        room.text("for n in $(seq 3 1023); do if test -e /proc/$$/fd/$n; then echo $n; fi; done").await;
    // 255 is where bash keeps its own.
    assert!(open.is_empty() || open == "255", "{open}");
}

pub async fn a_restarted_server_finds_it_again(backend: &mut impl Backend) {
    let room = Room::usual(backend).await;
    let pid = room.text("echo kept > ~/file; setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $!").await;
    let before = seen_up(backend, room.id).await;
    let id = room.id;
    drop(room);
    backend.restart().await;
    assert_eq!(seen(backend, id, is_up).await.unwrap(), before);
    let room = Room { id, links: Links::new(backend.environment()) };
    assert_eq!(room.text("cat ~/file").await, "kept");
    assert_eq!(room.text(&format!("cut -d' ' -f2 /proc/{pid}/stat")).await, "(sleep)");
    backend.environment().destroy(id).await.unwrap();
    assert_eq!(backend.remains(id).await, Vec::<String>::new());
}

pub async fn destroying_leaves_nothing(backend: &mut impl Backend) {
    let room = Room::usual(backend).await;
    room.text("setsid nohup sleep 1000 </dev/null >/dev/null 2>&1 & trap '' HUP TERM; echo file > ~/file")
        .await;
    let mut stubborn = room.start("trap '' HUP TERM INT; echo up; while :; do sleep 1; done").await;
    assert_eq!(stubborn.stdout.read().await.unwrap().unwrap().as_ref(), b"up\n");
    let environment = backend.environment();
    timeout(GONE, environment.destroy(room.id)).await.unwrap().unwrap();
    assert_eq!(backend.remains(room.id).await, Vec::<String>::new());
    // No byte and no success comes after the end.
    while let Ok(Some(_)) = stubborn.stdout.read().await {}
    assert!(matches!(exit(&mut stubborn.stdout).await, Exit::Lost(_)));
    seen(backend, room.id, |observed| observed.is_none()).await;
    assert_eq!(environment.inspect(room.id).await.unwrap(), None);
    assert!(matches!(environment.connect(room.id).await, Err(EnvironmentError::NotFound)));
    environment.destroy(room.id).await.unwrap();
    environment.destroy(EnvironmentId::new()).await.unwrap();
}

pub async fn a_killed_environment_is_seen_as_failed(backend: &mut impl Backend) {
    let room = Room::usual(backend).await;
    let mut process = room.start("echo up; exec sleep 1000").await;
    process.stdout.read().await.unwrap();
    seen_up(backend, room.id).await;
    backend.kill(room.id).await;
    seen(backend, room.id, has_failed).await;
    assert!(matches!(process.stdout.read().await, Ok(None) | Err(_)));
    assert!(matches!(exit(&mut process.stdout).await, Exit::Lost(_)));
    let inspected = backend.environment().inspect(room.id).await.unwrap();
    assert!(has_failed(inspected.as_ref()), "{inspected:?}");
    // It is not made anew under its name: what was in it is lost, and that is to be said.
    let again = Create { environment_id: room.id, ..create_request(EnvironmentSpec::default()) };
    assert!(matches!(backend.environment().create(&again).await, Err(EnvironmentError::Refused(_))));
    backend.environment().destroy(room.id).await.unwrap();
    assert_eq!(backend.remains(room.id).await, Vec::<String>::new());
}

pub async fn it_ends_by_itself_when_its_lifetime_is_over(backend: &mut impl Backend) {
    let begun = Instant::now();
    let request = Create { lifetime_seconds: 3, ..create_request(EnvironmentSpec::default()) };
    backend.environment().create(&request).await.unwrap();
    Room { id: request.environment_id, links: Links::new(backend.environment()) }.ready().await;
    seen(backend, request.environment_id, has_failed).await;
    assert!(begun.elapsed() > Duration::from_secs(2), "it ended of something else");
}

pub async fn the_setup_script_runs_once(backend: &mut impl Backend) {
    let room = Room::usual(backend).await;
    let link = room.link().await;
    let script = "echo run >> ~/runs; echo said; exit 7";
    let (one, two) = tokio::join!(link.setup(script), link.setup(script));
    let one = one.unwrap();
    assert_eq!((one.exit_code, one.tail.trim()), (7, "said"));
    assert_eq!(two.unwrap(), one);
    assert_eq!(link.setup(script).await.unwrap(), one);
    assert_eq!(room.text("cat ~/runs").await, "run");
}
