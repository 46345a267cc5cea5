@echo off
rem Finds or makes a Python environment in .venv, installs the portal's packages there, and hands over to
rem `python -m app.cli`, which does everything else. Try: setup_llm.bat --help
setlocal
set "ROOT=%~dp0"
set "VENV=%ROOT%.venv"
set "PYTHON=%VENV%\Scripts\python.exe"
set "REQUIREMENTS=%ROOT%backend\requirements.txt"
set "STAMP=%VENV%\requirements.stamp"
set "CHECK=import sys; sys.exit(sys.version_info < (3, 11))"

if not exist "%PYTHON%" goto make
"%PYTHON%" -c "%CHECK%" >nul 2>&1 || goto make
rem Without pip it is what an attempt left that broke off.
if exist "%STAMP%" goto installed
"%PYTHON%" -m pip --version >nul 2>&1 && goto installed

:make
set "FAILED="
for %%P in ("py -3" python3 python) do (
    %%~P -c "%CHECK%" >nul 2>&1 && (
        echo Making a Python environment in .venv ...
        %%~P -m venv --clear "%VENV%" && goto installed
        set "FAILED=1"
    )
)
if defined FAILED (
    echo The environment could not be made; the message above says why.
    exit /b 1
)
echo Prompt Portal needs Python 3.11 or newer, and none was found. To get one:
echo   winget install Python.Python.3.13
exit /b 1

:installed
fc /b "%REQUIREMENTS%" "%STAMP%" >nul 2>&1 && goto run
echo Installing the portal's packages (once, about half a minute) ...
"%PYTHON%" -m pip install --disable-pip-version-check --requirement "%REQUIREMENTS%" || (
    echo The packages could not be installed; the message above says why.
    exit /b 1
)
copy /y "%REQUIREMENTS%" "%STAMP%" >nul

:run
set "PYTHONPATH=%ROOT%backend"
"%PYTHON%" -m app.cli %*
exit /b %ERRORLEVEL%
