//! Who the environment's processes are: user, home, shell and base variables, from the environment's own `/etc/passwd`.
//!
//! A static program has no name service: the file is read here.
use std::path::Path;

use crate::options::Serve;

const PASSWD: &str = "/etc/passwd";
/// For an environment whose image sets none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The user of all processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Login name; the number when there is none.
    pub user: String,
    /// Home directory.
    pub home: String,
    /// Absolute path of the shell.
    pub shell: String,
    path: String,
}

impl Account {
    /// The account of this process's own user.
    pub fn of_this_process(options: &Serve) -> Self {
        let passwd = std::fs::read(PASSWD).unwrap_or_default();
        Self::new(
            rustix::process::getuid().as_raw(),
            &String::from_utf8_lossy(&passwd),
            std::env::var("PATH").ok(),
            options,
            |path| Path::new(path).exists(),
        )
    }

    fn new(
        uid: u32,
        passwd: &str,
        path: Option<String>,
        options: &Serve,
        exists: impl Fn(&str) -> bool,
    ) -> Self {
        let entry = passwd.lines().find_map(|line| Entry::parse(line).filter(|entry| entry.uid == uid));
        let usable =
            |shell: &&str| exists(shell) && !shell.ends_with("/nologin") && !shell.ends_with("/false");
        let shell = options.shell.clone().unwrap_or_else(|| {
            let own = entry.as_ref().map_or("", |entry| entry.shell);
            [own, "/bin/bash"].into_iter().find(usable).unwrap_or("/bin/sh").into()
        });
        let home =
            options.home.clone().unwrap_or_else(|| entry.as_ref().map_or("/", |entry| entry.home).into());
        Self {
            user: entry.map_or_else(|| uid.to_string(), |entry| entry.name.into()),
            home,
            shell,
            path: path.filter(|path| !path.is_empty()).unwrap_or_else(|| PATH.into()),
        }
    }

    /// `HOME USER LOGNAME SHELL PATH`.
    pub fn variables(&self) -> [(&str, &str); 5] {
        [
            ("HOME", &self.home),
            ("USER", &self.user),
            ("LOGNAME", &self.user),
            ("SHELL", &self.shell),
            ("PATH", &self.path),
        ]
    }
}

struct Entry<'a> {
    name: &'a str,
    uid: u32,
    home: &'a str,
    shell: &'a str,
}

impl<'a> Entry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let home = fields.nth(2)?;
        let shell = fields.next()?.trim_end();
        Some(Self { name, uid, home, shell })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "root:x:0:0:root:/root:/bin/bash\n\
        # no entry\nbroken\ncandidate:x:1000:1000:,,,:/home/candidate:/bin/zsh\nnobody:x:65534:65534::/:/usr/sbin/nologin\n";

    fn account(uid: u32, there: &[&str]) -> Account {
        Account::new(uid, FILE, None, &Serve::default(), |path| there.contains(&path))
    }

    #[test]
    fn the_environments_own_file_decides() {
        let account = account(1000, &["/bin/zsh", "/bin/bash"]);
        assert_eq!((account.user.as_str(), account.home.as_str()), ("candidate", "/home/candidate"));
        assert_eq!(account.shell, "/bin/zsh");
    }

    #[test]
    fn a_shell_that_is_missing_or_refuses_is_replaced() {
        assert_eq!(account(1000, &["/bin/bash"]).shell, "/bin/bash");
        assert_eq!(account(1000, &[]).shell, "/bin/sh");
        assert_eq!(account(65534, &["/usr/sbin/nologin"]).shell, "/bin/sh");
    }

    #[test]
    fn a_user_without_an_entry_is_its_number() {
        let account = account(4242, &[]);
        assert_eq!((account.user.as_str(), account.home.as_str()), ("4242", "/"));
    }

    #[test]
    fn options_win() {
        let options = Serve { shell: Some("/bin/fish".into()), home: Some("/h".into()), ..Serve::default() };
        let account = Account::new(0, FILE, Some("/p".into()), &options, |_| true);
        assert_eq!(account.variables().map(|(_, value)| value), ["/h", "root", "root", "/bin/fish", "/p"]);
    }
}
