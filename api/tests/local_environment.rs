//! Local environments: the conformance tests, and what only they promise. As root everything runs a second time as an
//! ordinary user.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]
#[path = "environment/conformance.rs"]
mod conformance;
#[path = "environment/agent.rs"]
mod program;

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use carrel_api::{
    environment::{
        Agent, Create, Environment, EnvironmentError, Phase,
        link::Links,
        local::{LocalEnvironment, LocalOptions},
    },
    exam::{EnvironmentSpec, Network},
    identity::EnvironmentId,
};
use conformance::{Backend, Room, create_request, seen};
use program::agent;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

/// Local environments in a data directory of their own.
struct Local {
    environment: Option<Arc<LocalEnvironment>>,
    data: PathBuf,
    _directory: TempDir,
}

fn open(data: &Path) -> LocalEnvironment {
    let options = LocalOptions { data_dir: data.to_owned(), agent: Agent::File(agent()), shared: Vec::new() };
    LocalEnvironment::new(options).unwrap()
}

impl Local {
    async fn open() -> Option<Self> {
        Self::at("data").await
    }

    async fn at(below: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join(below);
        let environment = open(&data);
        environment.check().await.unwrap();
        Some(Self { environment: Some(Arc::new(environment)), data, _directory: directory })
    }

    fn local(&self) -> &Arc<LocalEnvironment> {
        self.environment.as_ref().unwrap()
    }

    fn ids(&self) -> Vec<EnvironmentId> {
        let Ok(entries) = fs::read_dir(self.data.join("environments")) else { return Vec::new() };
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
    }

    /// Ends the test: everything goes, and that is checked.
    async fn close(self) {
        for id in self.ids() {
            self.local().destroy(id).await.unwrap();
            assert_eq!(self.remains(id).await, Vec::<String>::new());
        }
    }
}

impl Drop for Local {
    /// After a failed test.
    fn drop(&mut self) {
        let (data, ids) = (self.data.clone(), self.ids());
        if ids.is_empty() {
            return;
        }
        let tidy = move || {
            tokio::runtime::Runtime::new().unwrap().block_on(async {
                let environment = open(&data);
                for id in ids {
                    let _ = environment.destroy(id).await;
                }
            });
        };
        let _ = std::thread::spawn(tidy).join();
    }
}

#[async_trait]
impl Backend for Local {
    fn environment(&self) -> Arc<dyn Environment> {
        self.local().clone()
    }

    async fn restart(&mut self) {
        self.environment = None;
        self.environment = Some(Arc::new(open(&self.data)));
    }

    async fn kill(&self, id: EnvironmentId) {
        let agent = processes()
            .into_iter()
            .find(|process| process.line.starts_with(&format!("/run/carrel/{id}")))
            .unwrap();
        kill_process(agent.pid, Signal::KILL).unwrap();
    }

    async fn remains(&self, id: EnvironmentId) -> Vec<String> {
        let name = id.to_string();
        // As root an environment's processes have a user that nobody else has.
        let user = 0x7000_0000 | u32::try_from(id.uuid().as_u128() & 0x0fff_ffff).unwrap();
        let processes =
            processes().into_iter().filter(|process| process.line.contains(&name) || process.user == user);
        let mut remains: Vec<String> = processes.map(|process| process.line).collect();
        remains.extend(
            fs::read_to_string("/proc/self/mounts")
                .unwrap()
                .lines()
                .filter(|line| line.contains(&name))
                .map(str::to_owned),
        );
        let directory = self.data.join("environments").join(&name);
        remains.extend(directory.exists().then(|| directory.display().to_string()));
        remains
    }

    fn secrets(&self) -> Vec<PathBuf> {
        vec![self.data.clone(), self.data.parent().unwrap().to_owned(), fs::canonicalize(agent()).unwrap()]
    }
}

struct Seen {
    pid: Pid,
    user: u32,
    line: String,
}

/// All processes of this machine that have not ended.
fn processes() -> Vec<Seen> {
    let of = |entry: fs::DirEntry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let line = String::from_utf8_lossy(&fs::read(entry.path().join("cmdline")).ok()?).replace('\0', " ");
        (!line.is_empty()).then_some(Seen { pid, user: entry.metadata().ok()?.uid(), line })
    };
    fs::read_dir("/proc").unwrap().filter_map(|entry| of(entry.ok()?)).collect()
}

on_backend! { Local::open();
    creating_twice_is_one_environment,
    many_can_be_made_at_once,
    one_without_an_owner_is_given_one,
    every_exit_status_comes_back_exactly,
    bytes_come_back_unchanged_and_apart,
    variables_and_the_home_directory_are_as_promised,
    two_environments_share_nothing,
    the_system_is_read_only,
    no_privilege_can_be_had,
    storage_has_its_limit,
    processes_have_their_limit_and_a_fork_bomb_ends_with_it,
    memory_has_its_limit,
    nothing_of_the_server_is_visible,
    a_restarted_server_finds_it_again,
    destroying_leaves_nothing,
    a_killed_environment_is_seen_as_failed,
    it_ends_by_itself_when_its_lifetime_is_over,
    the_setup_script_runs_once,
}

#[tokio::test]
async fn a_data_directory_may_be_deeper_than_a_sockets_address_is_long() {
    let backend = Local::at(&["deep"; 40].join("/")).await.unwrap();
    let room = Room::usual(&backend).await;
    assert_eq!(room.text("echo reached").await, "reached");
    backend.close().await;
}

#[tokio::test]
async fn nobody_else_may_enter_the_directory_of_environments() {
    let backend = Local::open().await.unwrap();
    let room = Room::usual(&backend).await;
    let directory = backend.data.join("environments");
    for (path, mode) in [
        (directory.clone(), 0o700),
        (directory.join(room.id.to_string()), 0o700),
        (directory.join(format!("{}/environment.json", room.id)), 0o600),
    ] {
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, mode, "{}", path.display());
    }
    backend.close().await;
}

#[tokio::test]
async fn root_of_the_machine_is_not_whom_candidates_run_as() {
    if !geteuid().is_root() {
        return;
    }
    let backend = Local::open().await.unwrap();
    let (a, b) = (Room::usual(&backend).await, Room::usual(&backend).await);
    let users: BTreeSet<u32> = processes()
        .into_iter()
        .filter(|process| {
            process.line.contains(&a.id.to_string()) || process.line.contains(&b.id.to_string())
        })
        .map(|process| process.user)
        .collect();
    assert_eq!(users.len(), 2, "{users:?}");
    assert!(users.iter().all(|user| *user >= 0x7000_0000), "{users:?}");
    backend.close().await;
}

#[tokio::test]
async fn one_of_any_three_processes_gone_is_all_gone() {
    let mut backend = Local::open().await.unwrap();
    for victim in ["timeout", "bwrap", "/run/carrel"] {
        let room = Room::usual(&backend).await;
        room.text("setsid sleep 1000 </dev/null >/dev/null 2>&1 &").await;
        let all: Vec<Seen> =
            processes().into_iter().filter(|process| process.line.contains(&room.id.to_string())).collect();
        assert_eq!(all.len(), 3, "{:?}", all.iter().map(|process| &process.line).collect::<Vec<_>>());
        let process =
            all.iter().find(|process| process.line.split(' ').next().unwrap().contains(victim)).unwrap();
        // Not seen by a server, which would help.
        backend.environment = None;
        kill_process(process.pid, Signal::KILL).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while backend.remains(room.id).await.len() > 1 {
            assert!(std::time::Instant::now() < deadline, "{victim}: {:?}", backend.remains(room.id).await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        backend.restart().await;
        seen(&backend, room.id, |observed| matches!(observed.unwrap().phase, Phase::Failed(_))).await;
    }
    backend.close().await;
}

#[tokio::test]
async fn its_lifetime_ends_without_a_server() {
    let mut backend = Local::open().await.unwrap();
    let request = Create { lifetime_seconds: 2, ..create_request(EnvironmentSpec::default()) };
    backend.local().create(&request).await.unwrap();
    backend.environment = None;
    assert!(backend.remains(request.environment_id).await.len() > 1);
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while backend.remains(request.environment_id).await.len() > 1 {
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    backend.restart().await;
    backend.close().await;
}

#[tokio::test]
async fn a_data_directory_that_candidates_could_read_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let shared = vec![directory.path().canonicalize().unwrap()];
    let options =
        LocalOptions { data_dir: directory.path().join("data"), agent: Agent::File(agent()), shared };
    let error = LocalEnvironment::new(options).unwrap().check().await.unwrap_err();
    assert!(
        matches!(&error, EnvironmentError::Refused(reason) if reason.technical_details.contains("choose another"))
    );
}

#[tokio::test]
async fn what_this_machine_cannot_give_is_refused() {
    let backend = Local::open().await.unwrap();
    let specs = [
        EnvironmentSpec { network: Network::Internet, ..EnvironmentSpec::default() },
        EnvironmentSpec { user: Some("../root".into()), ..EnvironmentSpec::default() },
    ];
    for spec in specs {
        let request = create_request(spec);
        assert!(matches!(backend.local().create(&request).await, Err(EnvironmentError::Refused(_))));
        assert_eq!(backend.remains(request.environment_id).await, Vec::<String>::new());
    }
    backend.close().await;
}

#[tokio::test]
async fn an_exams_variables_are_given_to_all_that_runs_in_it_and_stand_in_no_process_list() {
    let local = Local::open().await.unwrap();
    let secret = format!("secret-{}", EnvironmentId::new());
    let spec = EnvironmentSpec {
        env: [("EXAM_SECRET".into(), secret.clone())].into(),
        ..EnvironmentSpec::default()
    };
    let room = Room::open(&local, spec).await;
    assert_eq!(room.text("echo \"$EXAM_SECRET\"").await, secret);
    let link = room.links.get(room.id).await.unwrap();
    assert_eq!(link.setup("echo \"$EXAM_SECRET\"").await.unwrap().tail.trim(), secret);
    for entry in fs::read_dir("/proc").unwrap() {
        // Of one that has ended meanwhile nothing can be read.
        let line = fs::read(entry.unwrap().path().join("cmdline")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&line).contains(&secret), "{}", String::from_utf8_lossy(&line));
    }
    local.close().await;
}

#[tokio::test]
async fn an_exam_may_name_the_user() {
    let backend = Local::open().await.unwrap();
    for user in ["student", "root"] {
        let room =
            Room::open(&backend, EnvironmentSpec { user: Some(user.into()), ..EnvironmentSpec::default() })
                .await;
        assert_eq!(
            room.text("id -un; cd; touch file; stat -c %U file; grep ^CapEff /proc/self/status").await,
            format!("{user}\n{user}\nCapEff:\t0000000000000000")
        );
        room.refused(&["touch /usr/bin/x", "mount -t tmpfs none /tmp", "touch /etc/x"]).await;
    }
    backend.close().await;
}

/// Not a test: a server that is killed. Makes and destroys environments until then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by another test"]
async fn a_server_to_kill() {
    let Some(data) = std::env::var_os("CARREL_TEST_DATA") else { return };
    let environment = open(Path::new(&data));
    println!("\nbegun");
    loop {
        let request = create_request(EnvironmentSpec::default());
        environment.create(&request).await.unwrap();
        let other = create_request(EnvironmentSpec::default());
        let (destroyed, created) =
            tokio::join!(environment.destroy(request.environment_id), environment.create(&other));
        destroyed.unwrap();
        created.unwrap();
    }
}

#[tokio::test]
async fn a_server_killed_at_any_point_leaves_nothing_unfinished() {
    let mut backend = Local::open().await.unwrap();
    for round in 0..40u64 {
        let mut server = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "a_server_to_kill"])
            .env("CARREL_TEST_DATA", &backend.data)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "begun"));
        // Not a wait for anything: the moment of the fault, another one in each round.
        std::thread::sleep(Duration::from_micros(round * 1700));
        server.kill().unwrap();
        server.wait().unwrap();

        backend.restart().await;
        let settled = |observation: &carrel_api::environment::Observation| {
            observation.complete && observation.environments.values().all(|seen| seen.phase == Phase::Up)
        };
        let mut observation = backend.local().observe();
        tokio::time::timeout(Duration::from_secs(10), observation.wait_for(|now| settled(now)))
            .await
            .unwrap()
            .unwrap();
        // What is up can be used, all else is gone.
        let ids: BTreeSet<EnvironmentId> = observation.borrow().environments.keys().copied().collect();
        assert_eq!(ids, backend.ids().into_iter().collect());
        let instance = fs::read_to_string(backend.data.join("environments/instance")).unwrap();
        // One that had not begun to be a sandbox when the new server first looked is found by a later look.
        let strays = || -> Vec<String> {
            let of_this = processes().into_iter().map(|process| process.line);
            let of_this = of_this.filter(|line| line.contains(instance.trim()));
            of_this.filter(|line| !ids.iter().any(|id| line.contains(&id.to_string()))).collect()
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !strays().is_empty() {
            assert!(std::time::Instant::now() < deadline, "{:?}", strays());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        for id in ids {
            Room { id, links: Links::new(backend.environment()) }.ready().await;
            backend.local().destroy(id).await.unwrap();
            assert_eq!(backend.remains(id).await, Vec::<String>::new());
        }
    }
    backend.close().await;
}

#[test]
fn everything_holds_for_an_ordinary_user_too() {
    const USER: u32 = 54_321;
    if !geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let place = |from: &Path, name: &str| {
        let to = directory.path().join(name);
        fs::copy(from, &to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
        to
    };
    let tests = place(&std::env::current_exe().unwrap(), "tests");
    let agent = place(&agent(), "agent");
    std::os::unix::fs::chown(directory.path(), Some(USER), Some(USER)).unwrap();
    let output = Command::new(tests)
        .args(["--test-threads=2"])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("TMPDIR", directory.path())
        .env("CARREL_AGENT", agent)
        .env("CARREL_TEST_SECRET", "must not be seen inside")
        .current_dir(directory.path())
        .uid(USER)
        .gid(USER)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(processes().iter().all(|process| process.user != USER));
}
